"""ELBOs of refinement: harmful steps gain nothing, and steps beyond the horizon are not selected."""

from typing import Any

import pytest
import torch
from torch import nn

from concord.model.vae.gaussian import Gaussian, antithetic, standard_like
from concord.training.concord import Concord
from concord.training.data.dataset import Batch
from concord.training.evaluation.metrics.refinement import EVALUATION_SAMPLES, refined_elbos

ROWS = 12


class SignRefiner(nn.Module):
    """A refiner that moves the mean by a fixed rate along the sign of the gradient."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, posterior: Gaussian, gradient: Gaussian) -> Gaussian:
        return Gaussian(posterior.mean + self.rate * gradient.mean.sign(), posterior.log_var)


@pytest.fixture
def batch(tiny_vae: Concord, make_rows: Any) -> Batch:
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    present[:, 0] |= ~present.any(1)
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


@pytest.fixture
def start() -> Gaussian:
    generator = torch.Generator().manual_seed(1)
    return Gaussian(torch.randn(ROWS, 6, generator=generator), torch.full((ROWS, 6), -4.0))


def with_sign_refiner(make_vae: Any, modalities: Any, rate: float) -> Concord:
    vae: Concord = make_vae(modalities)
    vae.refiner = SignRefiner(rate)  # type: ignore[assignment]
    return vae


def run(vae: Concord, batch: Batch, start: Gaussian, steps: int, extra_steps: int) -> Any:
    with torch.no_grad():
        return refined_elbos(vae, batch, start, steps, extra_steps, 4, torch.Generator().manual_seed(2))


def test_refined_elbos_of_the_start_equal_the_objective(tiny_vae: Concord, batch: Batch, start: Gaussian) -> None:
    by_step, evaluation = run(tiny_vae, batch, start, 3, 2)
    assert by_step.shape == (1 + 3 + 2, ROWS)
    assert evaluation.shape == (2, ROWS)
    generator = torch.Generator().manual_seed(2)
    noise, evaluation_noise = (antithetic(torch.randn(ROWS, n // 2, 6, generator=generator)) for n in (4, EVALUATION_SAMPLES))
    prior = standard_like(start)
    for elbo, samples in ((by_step[0], noise), (evaluation[0], evaluation_noise)):
        torch.testing.assert_close(elbo, tiny_vae.objective(batch.arrays, batch.present, start, prior, samples))


def test_refined_elbos_of_unchanged_posteriors_are_equal(
    make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian
) -> None:
    by_step, evaluation = run(with_sign_refiner(make_vae, tiny_modalities, 0.0), batch, start, 2, 1)
    assert torch.equal(by_step, by_step[:1].expand(4, ROWS))
    assert torch.equal(evaluation[0], evaluation[1])


def test_refined_elbos_of_harmful_steps_keep_start(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    by_step, evaluation = run(with_sign_refiner(make_vae, tiny_modalities, -0.5), batch, start, 3, 0)
    assert torch.all(by_step[1:] < by_step[0])
    assert torch.equal(evaluation[0], evaluation[1])


def test_refined_elbos_of_good_steps_rise(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    by_step, evaluation = run(with_sign_refiner(make_vae, tiny_modalities, 0.02), batch, start, 5, 0)
    assert torch.all(by_step[1:] > by_step[:-1])
    assert torch.all(evaluation[1] > evaluation[0])


def test_refined_elbos_best_ignores_extra_steps(make_vae: Any, tiny_modalities: Any, batch: Batch, start: Gaussian) -> None:
    vae = with_sign_refiner(make_vae, tiny_modalities, 0.02)
    (short, short_evaluation), (long, long_evaluation) = (run(vae, batch, start, 2, extra_steps) for extra_steps in (0, 4))
    assert torch.equal(long[:3], short)
    assert torch.equal(long_evaluation, short_evaluation)
    assert torch.all(long[-1] > short[-1])
