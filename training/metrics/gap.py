"""Amortization gap (Cremer et al. 2018): how far the amortised posterior's ELBO is from the best of its family, and how much of
that refinement closes. The best is found by 200 steps of Adam on every row's own mean and log variance."""

import torch
from jaxtyping import Float
from torch import Tensor

from model.vae.gaussian import LOG_VAR_RANGE, Gaussian, antithetic, standard_like
from model.vae.generative import Generative
from training.data import Batch

ADAM_STEPS, LEARNING_RATE = 200, 0.1
SAMPLES = 4  # of a step, fresh ones: on fixed noise Adam would fit the noise
JUDGE_SAMPLES = 64


def adam_limit(model: Generative, batch: Batch, start: Gaussian, generator: torch.Generator) -> Gaussian:
    """The posterior of each row after ADAM_STEPS of ascent from ``start`` on the ELBO of the modalities present, the learning
    rate falling to zero."""
    leaf = Gaussian(*(part.detach().clone().requires_grad_() for part in start))
    optimizer = torch.optim.Adam(leaf, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=ADAM_STEPS)
    prior = standard_like(start)
    for _ in range(ADAM_STEPS):
        noise = antithetic(torch.randn(len(batch.present), SAMPLES // 2, model.latent, generator=generator))
        with torch.enable_grad():
            loss = -model.objective(batch.arrays, batch.present, leaf, prior, noise).sum()
            slopes = torch.autograd.grad(loss, leaf)
        leaf.mean.grad, leaf.log_var.grad = slopes
        optimizer.step()
        schedule.step()
        leaf.log_var.data.clamp_(*LOG_VAR_RANGE)
    return leaf.detach()


def elbos(
    model: Generative, batch: Batch, posteriors: list[Gaussian], generator: torch.Generator
) -> Float[Tensor, "posterior batch"]:
    """The ELBO of each posterior in weighted nats, all judged with the same fresh noise."""
    noise = antithetic(torch.randn(len(batch.present), JUDGE_SAMPLES // 2, model.latent, generator=generator))
    prior = standard_like(posteriors[0])
    return torch.stack([model.objective(batch.arrays, batch.present, q, prior, noise) for q in posteriors])


def gap_closed(by_step: Float[Tensor, "step batch"], limit: Float[Tensor, " batch"]) -> list[float]:
    """Share of the mean gap that is closed after each step, 0 at step 0 and 1 at the limit; negative where steps do harm.

    A mean of the rows' shares would be ruled by rows whose gap is almost zero; this is the ratio of the means.

    Raises:
        ValueError: there is no gap: the limit is no better than the start.
    """
    gap = (limit - by_step[0]).mean()
    if not gap > 0:
        raise ValueError(f"the limit lies {gap:.4g} nats from the start: there is no gap to close")
    return ((by_step - by_step[0]).mean(1) / gap).tolist()
