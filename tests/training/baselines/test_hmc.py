"""Hamiltonian chains sample a given density from a distant start."""

import torch
from torch.distributions import MultivariateNormal

from concord.training.baselines.hmc import hamiltonian


def test_chains_sample_a_correlated_gaussian() -> None:
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]]) * 0.2
    target = MultivariateNormal(torch.tensor([1.0, -2.0]), covariance)
    start = torch.full((2, 1500, 2), 3.0)
    z = hamiltonian(target.log_prob, start, torch.Generator().manual_seed(0), steps=40)
    for row in z:
        torch.testing.assert_close(row.mean(0), target.mean, atol=0.06, rtol=0)
        torch.testing.assert_close(torch.cov(row.T), covariance, atol=0.04, rtol=0)


def test_rows_are_independent_and_results_are_detached() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    centre = torch.tensor([[[5.0]], [[-5.0]]])
    z = hamiltonian(
        lambda z: -(weight * (z - centre)).square().sum(-1), torch.zeros(2, 50, 1), torch.Generator().manual_seed(0), steps=40
    )
    assert torch.all(z[0] > 2)
    assert torch.all(z[1] < -2)
    assert not z.requires_grad


def test_diverging_proposals_are_rejected() -> None:
    start = torch.zeros(1, 20, 1)
    z = hamiltonian(lambda z: -(z**4).sum(-1) * 1e6, start + 0.1, torch.Generator().manual_seed(0), steps=20, step_size=1e3)
    assert torch.all(z.isfinite())
