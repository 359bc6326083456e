"""Importance sampling against a linear Gaussian model, whose likelihood is known."""

import pytest
import torch

from model.vae.gaussian import Gaussian
from tests.training.metrics.linear import Linear
from training.metrics.likelihood import log_likelihood
from training.posteriors import GaussianPosterior

ROWS = 5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("subset", [[0], [1], [0, 1]])
def test_the_exact_posterior_knows_it_from_one_sample(subset: list[int]) -> None:
    model = Linear()
    batch = model.batch(ROWS)
    seen = torch.zeros(ROWS, 2).bool()
    seen[:, subset] = True
    (posterior,) = model.posteriors(batch.arrays, [seen])
    for samples in (1, 20):
        found, effective = log_likelihood(model, batch.arrays, seen, posterior, samples, seeded())
        torch.testing.assert_close(found, model.evidence(batch.arrays, subset), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(effective, torch.full((ROWS,), float(samples)), rtol=1e-3, atol=0)


def test_likelihoods_are_not_weighted_and_beta_does_not_count() -> None:
    model = Linear()
    batch = model.batch(ROWS)
    (posterior,) = model.posteriors(batch.arrays, [batch.present])
    model.beta, model.weights = 7.0, {"a": 3.0, "b": 0.1}
    found, _ = log_likelihood(model, batch.arrays, batch.present, posterior, 1, seeded())
    torch.testing.assert_close(found, model.evidence(batch.arrays, [0, 1]), rtol=1e-4, atol=1e-4)


def test_a_poor_proposal_is_a_lower_bound_that_rises() -> None:
    model = Linear()
    batch = model.batch(400)
    (exact,) = model.posteriors(batch.arrays, [batch.present])
    poor = GaussianPosterior(Gaussian(exact.mean + 0.5, torch.full_like(exact.mean, -0.5)))
    truth = model.evidence(batch.arrays, [0, 1]).mean()
    bounds, effective = [], []
    for samples in (1, 8, 512):
        found, size = log_likelihood(model, batch.arrays, batch.present, poor, samples, seeded())
        bounds.append(found.mean())
        effective.append(size.mean() / samples)
    assert bounds == sorted(bounds)
    assert bounds[0] < truth - 0.5
    assert abs(bounds[-1] - truth) < 0.05
    assert effective[-1] < 0.8


def test_the_difference_of_two_is_the_conditional() -> None:
    """log p(x_b | x_a), against the Gaussian conditional."""
    model = Linear()
    batch = model.batch(ROWS)
    first = torch.tensor([True, False]).expand(ROWS, 2)
    both, alone = model.posteriors(batch.arrays, [batch.present, first])
    found = (
        log_likelihood(model, batch.arrays, batch.present, both, 4, seeded())[0]
        - log_likelihood(model, batch.arrays, first, alone, 4, seeded())[0]
    )
    expected = model.evidence(batch.arrays, [0, 1]) - model.evidence(batch.arrays, [0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
