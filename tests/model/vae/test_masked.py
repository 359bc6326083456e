"""``run_present``: networks run only on rows that have the modality, with the same results and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concord.model.vae.gaussian import Gaussian, sample
from concord.model.vae.likelihood import log_likelihood
from concord.model.vae.masked import run_present
from concord.model.vae.multimodal import MultimodalVAE

ROWS = 9
PRESENT = torch.tensor([True, False, True, True, False, False, True, False, True])


class Counting(nn.Module):
    """A linear layer that records the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.layer(x)


@pytest.mark.parametrize(
    ("present", "rows_run"), [(PRESENT, 5), (torch.ones(ROWS, dtype=torch.bool), 9), (PRESENT & ~PRESENT, 0)]
)
def test_run_present_runs_on_present_rows_only(present: Tensor, rows_run: int) -> None:
    network = Counting()
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    result = run_present(network, present, torch.where(present.unsqueeze(1), x, torch.nan))
    assert network.rows == [rows_run]
    torch.testing.assert_close(result, torch.where(present.unsqueeze(1), network(x), 0.0))
    result.sum().backward()
    assert network.layer.weight.grad is not None
    torch.testing.assert_close(network.layer.weight.grad[0], x[present].sum(0))


@pytest.fixture
def vae(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    return make_vae(tiny_vae.modalities).requires_grad_(True)


def test_weighted_log_likelihood_and_gradients_equal_masking_after_the_networks(vae: MultimodalVAE, make_rows: Any) -> None:
    """The reference runs all networks on all rows and masks afterwards."""
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    arrays = make_rows(vae.modalities, ROWS)
    noise = torch.randn(ROWS, 2, vae.latent, generator=torch.Generator().manual_seed(1))

    def gradients(value: Tensor) -> list[Tensor]:
        computed = torch.autograd.grad(value.sum(), list(vae.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(vae.parameters(), computed, strict=True)]

    actual = vae.weighted_log_likelihood(arrays, present, sample(vae.joint(arrays, present), noise))
    z = sample(vae.joint.fuse(vae.joint.features(arrays), present), noise)
    terms = []
    for m in vae.modalities:
        raw = vae.decoders[m.name](z.flatten(0, 1))
        terms.append(vae.weights[m.name] * log_likelihood(m, raw, arrays[m.name].repeat_interleave(2, dim=0)).view(ROWS, 2))
    expected = torch.where(present.unsqueeze(1), torch.stack(terms, dim=-1), 0.0).sum(-1)
    torch.testing.assert_close(actual, expected)
    for gradient, expected_gradient in zip(gradients(actual), gradients(expected), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)  # the order of summation differs


def test_log_likelihoods_of_chosen_modalities_are_those_of_all_and_zero_elsewhere(vae: MultimodalVAE, make_rows: Any) -> None:
    chosen = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    arrays, z = make_rows(vae.modalities, ROWS), torch.randn(ROWS, 2, vae.latent, generator=torch.Generator().manual_seed(1))
    expected = torch.where(chosen.unsqueeze(1), vae.log_likelihoods(arrays, z), 0.0)
    torch.testing.assert_close(vae.log_likelihoods(arrays, z, chosen), expected)


def test_gradient_of_a_row_does_not_depend_on_subsets_of_other_rows(vae: MultimodalVAE, make_rows: Any) -> None:
    present = torch.tensor([[True, False, True, False], [False, True, True, True], [True, True, True, True]])
    arrays = make_rows(vae.modalities, 3)
    posterior, prior = Gaussian(torch.ones(3, vae.latent), torch.zeros(3, vae.latent)), Gaussian(*torch.zeros(2, 3, vae.latent))
    noise = torch.randn(3, 2, vae.latent, generator=torch.Generator().manual_seed(0))
    batch, objective = vae.gradient(arrays, present, posterior, prior, noise)
    for i in range(3):
        row = slice(i, i + 1)
        gaussians = [Gaussian(*(tensor[row] for tensor in q)) for q in (posterior, prior)]
        single, value = vae.gradient({name: x[row] for name, x in arrays.items()}, present[row], *gaussians, noise[row])
        torch.testing.assert_close(single.mean, batch.mean[row])
        torch.testing.assert_close(single.log_var, batch.log_var[row])
        torch.testing.assert_close(value, objective[row])
