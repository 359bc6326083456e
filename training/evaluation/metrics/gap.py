"""Amortization gap (Cremer et al. 2018): the ELBO that the amortised posterior lacks to the best Gaussian of each row.

The best Gaussian is found by 200 steps of Adam on the mean and log variance of each row. ``gap_closed`` is the share of the gap
that refinement closes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from concord.model.vae.gaussian import LOG_VAR_RANGE, Gaussian, antithetic, standard_like
from concord.model.vae.generative import Generative
from concord.training.data.dataset import Batch

ADAM_STEPS, LEARNING_RATE = 200, 0.1
SAMPLES = 4
"""Noise samples per Adam step, new at each step: Adam would overfit fixed noise."""
EVALUATION_SAMPLES = 64

Objective = Callable[[Gaussian, Float[Tensor, "batch sample latent"]], Float[Tensor, " batch"]]


def adam_limit(model: Generative, batch: Batch, start: Gaussian, generator: torch.Generator) -> Gaussian:
    """Return each row's posterior after ADAM_STEPS of Adam from ``start``, to maximise the ELBO of the modalities present."""
    prior = standard_like(start)
    return best_gaussian(lambda q, noise: model.objective(batch.arrays, batch.present, q, prior, noise), start, generator)


def best_gaussian(objective: Objective, start: Gaussian, generator: torch.Generator, samples: int = SAMPLES) -> Gaussian:
    """Return the Gaussian of each row after ADAM_STEPS of Adam from ``start``, which maximise ``objective``.

    The learning rate falls linearly to zero.

    Args:
        objective: of each row (batch,), given a Gaussian and standard normal noise (batch, sample, latent). No row may change
            the objective of another one.
        samples: noise samples per step, an even number.
    """
    leaf = Gaussian(*(part.detach().clone().requires_grad_() for part in start))
    optimizer = torch.optim.Adam(leaf, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=ADAM_STEPS)
    rows, latent = start.mean.shape
    for _ in range(ADAM_STEPS):
        noise = antithetic(torch.randn(rows, samples // 2, latent, generator=generator)).to(start.mean.device)
        with torch.enable_grad():
            loss = -objective(leaf, noise).sum()
            gradients = torch.autograd.grad(loss, leaf)
        leaf.mean.grad, leaf.log_var.grad = gradients
        optimizer.step()
        schedule.step()
        leaf.log_var.data.clamp_(*LOG_VAR_RANGE)
    return leaf.detach()


def elbos(
    model: Generative, batch: Batch, posteriors: list[Gaussian], generator: torch.Generator
) -> Float[Tensor, "posterior batch"]:
    """Return the ELBO of each posterior in weighted nats, all estimated with the same noise."""
    noise = antithetic(torch.randn(len(batch.present), EVALUATION_SAMPLES // 2, model.latent, generator=generator))
    prior = standard_like(posteriors[0])
    return torch.stack([model.objective(batch.arrays, batch.present, q, prior, noise) for q in posteriors])


def gap_closed(by_step: Float[Tensor, "step batch"], limit: Float[Tensor, " batch"]) -> list[float]:
    """Return the share of the mean gap that is closed after each step: 0 at step 0, 1 at the limit, negative below the start.

    This is the ratio of the means. The mean of the rows' ratios would be dominated by rows whose gap is almost zero.

    Args:
        by_step: ELBO after each refinement step.
        limit: ELBO of the Adam limit.

    Raises:
        ValueError: the limit is not better than the start.
    """
    gap = (limit - by_step[0]).mean()
    if not gap > 0:
        raise ValueError(f"there is no gap to close: the limit minus the start is {gap:.4g} nats")
    return ((by_step - by_step[0]).mean(1) / gap).tolist()
