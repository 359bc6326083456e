"""The figure cannot be better than the truth: harmful steps gain nothing, steps beyond the horizon do not count."""

from typing import Any

import pytest
import torch
from torch import nn

from model.vae.gaussian import Gaussian, antithetic, standard_like
from model.vae.multimodal import MultimodalVAE
from training.data import Batch
from training.metrics.refinement import JUDGE_SAMPLES, refined_elbos

ROWS = 12


class Moves(nn.Module):
    """A refiner that moves the mean along the gradient, whatever was learned."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, posterior: Gaussian, gradient: Gaussian) -> Gaussian:
        return Gaussian(posterior.mean + self.rate * gradient.mean.sign(), posterior.log_var)


@pytest.fixture
def batch(tiny_vae: MultimodalVAE, make_rows: Any) -> Batch:
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    present[:, 0] |= ~present.any(1)
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


@pytest.fixture
def start() -> Gaussian:
    generator = torch.Generator().manual_seed(1)
    return Gaussian(torch.randn(ROWS, 6, generator=generator), torch.full((ROWS, 6), -4.0))


def with_moves(make_vae: Any, modalities: Any, rate: float) -> MultimodalVAE:
    vae: MultimodalVAE = make_vae(modalities)
    vae.refiner = Moves(rate)  # type: ignore[assignment]
    return vae


def run(vae: MultimodalVAE, batch: Batch, start: Gaussian, steps: int, beyond: int) -> Any:
    with torch.no_grad():
        return refined_elbos(vae, batch, start, steps, beyond, 4, torch.Generator().manual_seed(2))


def test_shapes_and_the_first_step(tiny_vae: MultimodalVAE, batch: Batch, start: Gaussian) -> None:
    climbed, judged = run(tiny_vae, batch, start, 3, 2)
    assert climbed.shape == (1 + 3 + 2, ROWS)
    assert judged.shape == (2, ROWS)
    generator = torch.Generator().manual_seed(2)
    noise, judge = (antithetic(torch.randn(ROWS, n // 2, 6, generator=generator)) for n in (4, JUDGE_SAMPLES))
    prior = standard_like(start)
    for found, fixed in ((climbed[0], noise), (judged[0], judge)):
        torch.testing.assert_close(found, tiny_vae.objective(batch.arrays, batch.present, start, prior, fixed))


def test_standing_still_gains_nothing(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    climbed, judged = run(with_moves(make_vae, tiny_modalities, 0.0), batch, start, 2, 1)
    assert torch.equal(climbed, climbed[:1].expand(4, ROWS))
    assert torch.equal(judged[0], judged[1])


def test_harmful_steps_are_not_kept(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    climbed, judged = run(with_moves(make_vae, tiny_modalities, -0.5), batch, start, 3, 0)
    assert torch.all(climbed[1:] < climbed[0])
    assert torch.equal(judged[0], judged[1])


def test_good_steps_show(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    climbed, judged = run(with_moves(make_vae, tiny_modalities, 0.02), batch, start, 5, 0)
    assert torch.all(climbed[1:] > climbed[:-1])
    assert torch.all(judged[1] > judged[0])


def test_steps_beyond_the_horizon_are_only_watched(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    vae = with_moves(make_vae, tiny_modalities, 0.02)
    (short, verdict), (long, watched) = (run(vae, batch, start, 2, beyond) for beyond in (0, 4))
    assert torch.equal(long[:3], short)
    assert torch.equal(watched, verdict)
    assert torch.all(long[-1] > short[-1])
