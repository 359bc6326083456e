"""Adam finds the exact posterior of a linear Gaussian model; shares of the gap are what they say."""

import pytest
import torch

from model.vae.gaussian import Gaussian, kl
from tests.training.metrics.linear import LATENT, Linear
from training.metrics.gap import adam_limit, elbos, gap_closed

ROWS = 100


def test_the_limit_is_the_exact_posterior() -> None:
    model = Linear()
    batch = model.batch(ROWS)
    (exact,) = model.posteriors(batch.arrays, [batch.present])
    start = Gaussian(torch.zeros(ROWS, LATENT), torch.zeros(ROWS, LATENT))
    with torch.no_grad():  # as metrics run
        limit = adam_limit(model, batch, start, torch.Generator().manual_seed(0))
        before, after, best = elbos(model, batch, [start, limit, exact.gaussian], torch.Generator().manual_seed(1))
    assert kl(limit, exact.gaussian).max() < 0.1
    # No gap is left; the noise of the judges' samples is.
    torch.testing.assert_close(best.mean(), model.evidence(batch.arrays, [0, 1]).mean(), atol=0.1, rtol=0)
    assert torch.all(after > before)
    assert (best - after).mean() < 0.03
    # The gap is the KL divergence from the exact posterior.
    torch.testing.assert_close((best - before).mean(), kl(start, exact.gaussian).mean(), rtol=0.05, atol=0)


def test_shares_of_the_gap() -> None:
    by_step = torch.tensor([[0.0, -4.0], [1.0, 0.0], [2.0, 2.0], [-2.0, -4.0]])
    assert gap_closed(by_step, torch.tensor([2.0, 2.0])) == pytest.approx([0, 5 / 8, 1, -2 / 8])


def test_no_gap_cannot_be_closed() -> None:
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed(torch.zeros(2, 3), torch.zeros(3))
