"""What refinement gains: the ELBO by step, and the share of rows that it raises."""

import torch
from jaxtyping import Float
from torch import Tensor

from model.vae.gaussian import Gaussian, antithetic, standard_like
from model.vae.multimodal import MultimodalVAE
from training.data import Batch

JUDGE_SAMPLES = 16  # fresh noise, so that a step which only fits its own noise does not count as a gain


def refined_elbos(
    vae: MultimodalVAE, batch: Batch, start: Gaussian, steps: int, beyond: int, samples: int, generator: torch.Generator
) -> tuple[Float[Tensor, "step batch"], Float[Tensor, "two batch"]]:
    """Refine as the service does, and judge what comes out.

    Args:
        steps: T, what the service would be asked for.
        beyond: further steps, only watched, to see whether they overshoot.
        samples: noise samples of each step, an even number, fixed over the steps.

    Returns:
        the ELBO at each step, (1 + steps + beyond, batch), with the noise that was climbed; and the ELBO of lambda_0 and of the
        best up to lambda_T, both with the same ``JUDGE_SAMPLES`` fresh samples. In weighted nats.
    """
    noise = antithetic(torch.randn(len(batch.present), samples // 2, vae.latent, generator=generator))
    judge = antithetic(torch.randn(len(batch.present), JUDGE_SAMPLES // 2, vae.latent, generator=generator))
    prior = standard_like(start)
    posterior, best = start, start
    climbed: list[Tensor] = []
    for step in range(steps + beyond + 1):
        after, objective = vae.refine_step(batch.arrays, batch.present, posterior, prior, noise)
        better = (objective > torch.stack(climbed).amax(0)) if step else torch.ones_like(objective, dtype=torch.bool)
        if step <= steps:
            best = Gaussian(*(torch.where(better[:, None], new, old) for new, old in zip(posterior, best, strict=True)))
        climbed.append(objective)
        posterior = after
    judged = [vae.objective(batch.arrays, batch.present, q, prior, judge) for q in (start, best)]
    return torch.stack(climbed), torch.stack(judged)
