"""The gain of refinement: the ELBO of each step."""

import torch
from jaxtyping import Float
from torch import Tensor

from concord.model.vae.gaussian import Gaussian, antithetic, standard_like
from concord.training.data.dataset import Batch
from concord.training.trainable import TrainableModel

EVALUATION_SAMPLES = 16
"""Noise samples of the evaluation. They are new, so that a step which only fits its noise does not count as a gain."""


def refined_elbos(
    model: TrainableModel, batch: Batch, start: Gaussian, steps: int, extra_steps: int, samples: int, generator: torch.Generator
) -> tuple[Float[Tensor, "step batch"], Float[Tensor, "two batch"]]:
    """Refine as the service does and return ELBOs in weighted nats.

    Args:
        start: lambda_0.
        steps: T, the steps that a request to the service takes.
        extra_steps: steps beyond T that are recorded to show overshooting, but never selected as the best.
        samples: noise samples, an even number (antithetic pairs), the same for all steps.

    Returns:
        (1 + steps + extra_steps, batch): the ELBO at each step, estimated with the noise of the refinement; and (2, batch): the
        ELBO of lambda_0 and of the best of lambda_0 ... lambda_T, both estimated with ``EVALUATION_SAMPLES`` new samples.
    """
    noise = antithetic(torch.randn(len(batch.present), samples // 2, model.latent, generator=generator))
    evaluation_noise = antithetic(torch.randn(len(batch.present), EVALUATION_SAMPLES // 2, model.latent, generator=generator))
    prior = standard_like(start)
    posterior, best = start, start
    by_step: list[Tensor] = []
    for step in range(steps + extra_steps + 1):
        refined, objective = model.refine_step(batch.arrays, batch.present, posterior, prior, noise)
        improved = (objective > torch.stack(by_step).amax(0)) if step else torch.ones_like(objective, dtype=torch.bool)
        if step <= steps:
            best = Gaussian(*(torch.where(improved[:, None], new, old) for new, old in zip(posterior, best, strict=True)))
        by_step.append(objective)
        posterior = refined
    evaluation = [model.objective(batch.arrays, batch.present, q, prior, evaluation_noise) for q in (start, best)]
    return torch.stack(by_step), torch.stack(evaluation)
