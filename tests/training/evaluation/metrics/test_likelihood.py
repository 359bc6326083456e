"""Importance sampling on a linear Gaussian model, whose likelihood is known."""

import pytest
import torch

from concord.model.vae.gaussian import Gaussian, kl
from concord.training.evaluation.metrics.likelihood import best_proposal, log_likelihood
from concord.training.posteriors import GaussianPosterior
from tests.support.linear import Linear

ROWS = 5


def masked(subset: list[int]) -> torch.Tensor:
    """The mask of rows that have the modalities of a subset."""
    present = torch.zeros(ROWS, 2).bool()
    present[:, subset] = True
    return present


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("subset", [[0], [1], [0, 1]])
def test_log_likelihood_with_exact_posterior_is_exact_for_one_sample(subset: list[int]) -> None:
    model = Linear()
    batch, present = model.batch(ROWS), masked(subset)
    (posterior,) = model.posteriors(batch.arrays, [present])
    for samples in (1, 20):
        estimate, effective = log_likelihood(model, batch.arrays, present, posterior, samples, seeded())
        torch.testing.assert_close(estimate, model.log_marginal_likelihood(batch.arrays, subset), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(effective, torch.full((ROWS,), float(samples)), rtol=1e-3, atol=0)


def test_log_likelihood_ignores_weights_and_beta() -> None:
    model = Linear()
    batch = model.batch(ROWS)
    (posterior,) = model.posteriors(batch.arrays, [batch.present])
    model.beta, model.weights = 7.0, {"a": 3.0, "b": 0.1}
    estimate, _ = log_likelihood(model, batch.arrays, batch.present, posterior, 1, seeded())
    torch.testing.assert_close(estimate, model.log_marginal_likelihood(batch.arrays, [0, 1]), rtol=1e-4, atol=1e-4)


def test_best_proposal_is_the_exact_posterior_of_a_model_trained_with_weights_and_beta() -> None:
    model = Linear()
    batch = model.batch(ROWS)
    (exact,) = model.posteriors(batch.arrays, [batch.present])
    model.beta, model.weights = 7.0, {"a": 3.0, "b": 0.1}
    proposal = best_proposal(model, batch.arrays, batch.present, torch.zeros_like(exact.mean), seeded())
    assert kl(proposal.gaussian, exact.gaussian).max() < 0.1
    estimate, effective = log_likelihood(model, batch.arrays, batch.present, proposal, 64, seeded())
    torch.testing.assert_close(estimate, model.log_marginal_likelihood(batch.arrays, [0, 1]), rtol=0, atol=0.1)
    assert effective.min() > 50


@pytest.mark.parametrize("subset", [[0], [1]])
def test_best_proposal_uses_the_present_modalities_only(subset: list[int]) -> None:
    model = Linear()
    batch, present = model.batch(ROWS), masked(subset)
    (exact,) = model.posteriors(batch.arrays, [present])
    assert kl(best_proposal(model, batch.arrays, present, exact.mean, seeded()).gaussian, exact.gaussian).max() < 0.1


def test_log_likelihood_with_poor_proposal_is_a_rising_lower_bound() -> None:
    model = Linear()
    batch = model.batch(400)
    (exact,) = model.posteriors(batch.arrays, [batch.present])
    proposal = GaussianPosterior(Gaussian(exact.mean + 0.5, torch.full_like(exact.mean, -0.5)))
    truth = model.log_marginal_likelihood(batch.arrays, [0, 1]).mean()
    bounds, effective = [], []
    for samples in (1, 8, 512):
        estimate, size = log_likelihood(model, batch.arrays, batch.present, proposal, samples, seeded())
        bounds.append(estimate.mean())
        effective.append(size.mean() / samples)
    assert bounds == sorted(bounds)
    assert bounds[0] < truth - 0.5
    assert abs(bounds[-1] - truth) < 0.05
    assert effective[-1] < 0.8


def test_difference_of_log_likelihoods_is_the_conditional() -> None:
    """log p(x_b | x_a) against the closed form."""
    model = Linear()
    batch = model.batch(ROWS)
    first = torch.tensor([True, False]).expand(ROWS, 2)
    joint, unimodal = model.posteriors(batch.arrays, [batch.present, first])
    estimate = (
        log_likelihood(model, batch.arrays, batch.present, joint, 4, seeded())[0]
        - log_likelihood(model, batch.arrays, first, unimodal, 4, seeded())[0]
    )
    expected = model.log_marginal_likelihood(batch.arrays, [0, 1]) - model.log_marginal_likelihood(batch.arrays, [0])
    torch.testing.assert_close(estimate, expected, rtol=1e-3, atol=1e-3)
