"""Rows that lack a modality cost nothing and change nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.vae.gaussian import Gaussian, sample
from model.vae.likelihood import log_likelihood
from model.vae.multimodal import MultimodalVAE
from model.vae.presence import of_present

ROWS = 9
SEEN = torch.tensor([True, False, True, True, False, False, True, False, True])


class Counting(nn.Module):
    """Remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.layer(x)


@pytest.mark.parametrize(("seen", "run"), [(SEEN, 5), (torch.ones(ROWS, dtype=torch.bool), 9), (SEEN & ~SEEN, 0)])
def test_a_network_runs_on_the_rows_that_are_there(seen: Tensor, run: int) -> None:
    network = Counting()
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    made = of_present(network, seen, torch.where(seen.unsqueeze(1), x, torch.nan))
    assert network.rows == [run]
    torch.testing.assert_close(made, torch.where(seen.unsqueeze(1), network(x), 0.0))
    made.sum().backward()
    assert network.layer.weight.grad is not None
    torch.testing.assert_close(network.layer.weight.grad[0], x[seen].sum(0))


@pytest.fixture
def vae(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    return make_vae(tiny_vae.modalities).requires_grad_(True)


def test_evidence_and_slopes_are_those_of_whole_batches(vae: MultimodalVAE, make_rows: Any) -> None:
    """Against all rows through all networks, what is absent struck out afterwards."""
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    arrays = make_rows(vae.modalities, ROWS)
    noise = torch.randn(ROWS, 2, vae.latent, generator=torch.Generator().manual_seed(1))

    def slopes(evidence: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(evidence.sum(), list(vae.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(vae.parameters(), found, strict=True)]

    found = vae.evidences(arrays, present, sample(vae.joint(arrays, present), noise))
    z = sample(vae.joint.fuse(vae.joint.features(arrays), present), noise)
    terms = []
    for m in vae.modalities:
        raw = vae.decoders[m.name](z.flatten(0, 1))
        terms.append(vae.weights[m.name] * log_likelihood(m, raw, arrays[m.name].repeat_interleave(2, dim=0)).view(ROWS, 2))
    expected = torch.where(present.unsqueeze(1), torch.stack(terms, dim=-1), 0.0).sum(-1)
    torch.testing.assert_close(found, expected)
    for one, other in zip(slopes(found), slopes(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums in another order


def test_the_gradient_of_a_posterior_passes(vae: MultimodalVAE, make_rows: Any) -> None:
    """Each row's own, as the refiner asks for it: alone or in a batch where others lack other modalities."""
    present = torch.tensor([[True, False, True, False], [False, True, True, True], [True, True, True, True]])
    arrays = make_rows(vae.modalities, 3)
    posterior, prior = Gaussian(torch.ones(3, vae.latent), torch.zeros(3, vae.latent)), Gaussian(*torch.zeros(2, 3, vae.latent))
    noise = torch.randn(3, 2, vae.latent, generator=torch.Generator().manual_seed(0))
    together, objective = vae.gradient(arrays, present, posterior, prior, noise)
    for row in range(3):
        own = slice(row, row + 1)
        one = [Gaussian(*(part[own] for part in q)) for q in (posterior, prior)]
        alone, value = vae.gradient({name: x[own] for name, x in arrays.items()}, present[own], *one, noise[own])
        torch.testing.assert_close(alone.mean, together.mean[own])
        torch.testing.assert_close(alone.log_var, together.log_var[own])
        torch.testing.assert_close(value, objective[own])
