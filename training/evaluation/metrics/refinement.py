"""Refinement as the service does it, and its gain: the ELBO of each step."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from concord.model.vae.gaussian import Gaussian, antithetic, standard_like
from concord.training.data.dataset import Batch
from concord.training.trainable import TrainableModel

EVALUATION_SAMPLES = 16
"""Noise samples of the evaluation. They are new, so that a step which only fits its noise does not count as a gain."""


def refinement(
    model: TrainableModel,
    batch: Batch,
    start: Gaussian,
    anchor: Gaussian,
    noise: Float[Tensor, "batch sample latent"],
    steps: int,
) -> Iterator[tuple[Gaussian, Float[Tensor, " batch"]]]:
    """Yield the result of a request with each number of steps, from 0 to ``steps``.

    As in the service, this is the posterior with the highest objective so far.

    Args:
        batch: rows with the modalities that refinement uses.
        start: lambda_0.
        anchor: second argument of the KL term, see ``refinement_anchor``.
        noise: antithetic pairs, the same for all steps.

    Yields:
        the result, and the objective (batch,) of the last step in weighted nats, which may be lower than that of the result.
    """
    posterior = best = start
    highest: Tensor | None = None
    for _ in range(steps + 1):
        following, objective = model.refine_step(batch.arrays, batch.present, posterior, anchor, noise)
        improved = torch.ones_like(objective, dtype=torch.bool) if highest is None else objective > highest
        highest = objective if highest is None else torch.where(improved, objective, highest)
        best = Gaussian(*(torch.where(improved[:, None], new, old) for new, old in zip(posterior, best, strict=True)))
        yield best, objective
        posterior = following


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
    results, by_step = zip(*refinement(model, batch, start, prior, noise, steps + extra_steps), strict=True)
    evaluation = [model.objective(batch.arrays, batch.present, q, prior, evaluation_noise) for q in (start, results[steps])]
    return torch.stack(by_step), torch.stack(evaluation)
