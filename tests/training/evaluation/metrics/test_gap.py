"""The amortization gap of a linear Gaussian model, whose exact posterior is known."""

import pytest
import torch

from concord.model.vae.gaussian import Gaussian, kl
from concord.training.evaluation.metrics.gap import adam_limit, elbos, gap_closed
from tests.support.linear import LATENT, Linear

ROWS = 100


def test_adam_limit_of_linear_gaussian_model_is_the_exact_posterior() -> None:
    model = Linear()
    batch = model.batch(ROWS)
    (exact,) = model.posteriors(batch.arrays, [batch.present])
    start = Gaussian(torch.zeros(ROWS, LATENT), torch.zeros(ROWS, LATENT))
    with torch.no_grad():  # as in evaluation
        limit = adam_limit(model, batch, start, torch.Generator().manual_seed(0))
        before, after, best = elbos(model, batch, [start, limit, exact.gaussian], torch.Generator().manual_seed(1))
    assert kl(limit, exact.gaussian).max() < 0.1
    # The exact posterior has no gap. The tolerance covers the noise of the samples.
    torch.testing.assert_close(best.mean(), model.log_marginal_likelihood(batch.arrays, [0, 1]).mean(), atol=0.1, rtol=0)
    assert torch.all(after > before)
    assert (best - after).mean() < 0.03
    # The gap is the KL divergence from the exact posterior.
    torch.testing.assert_close((best - before).mean(), kl(start, exact.gaussian).mean(), rtol=0.05, atol=0)


def test_gap_closed_is_the_ratio_of_means() -> None:
    by_step = torch.tensor([[0.0, -4.0], [1.0, 0.0], [2.0, 2.0], [-2.0, -4.0]])
    assert gap_closed(by_step, torch.tensor([2.0, 2.0])) == pytest.approx([0, 5 / 8, 1, -2 / 8])


def test_gap_closed_without_gap_is_rejected() -> None:
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed(torch.zeros(2, 3), torch.zeros(3))
