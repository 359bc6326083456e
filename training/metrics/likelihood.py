"""log p(x_S) of the generative model by importance sampling (Burda et al. 2016, equation 8): plain nats, neither likelihood
weights nor beta, so that models with different objectives can be compared."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.vae.generative import Generative
from training.posteriors import Posterior, log_prior

CHUNK = 16  # samples decoded at a time


def log_likelihood(
    model: Generative,
    arrays: Mapping[str, Tensor],
    seen: Bool[Tensor, "batch modality"],
    proposal: Posterior,
    samples: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """log 1/K sum_k p(x_S | z_k) p(z_k) / q(z_k | x_S), z_k ~ q, of each row.

    A lower bound on average, that rises with K; how near it is shows in the effective number of samples.

    Args:
        seen: S.
        proposal: q, of any subset; the posterior of S itself comes nearest.
        samples: K.

    Returns:
        the estimate in nats, and the effective sample size (sum w)^2 / sum w^2, between 1 and K.
    """
    terms = []
    for done in range(0, samples, CHUNK):
        z = proposal.sample(min(CHUNK, samples - done), generator)
        each = model.log_likelihoods(arrays, z)
        evidence = torch.where(seen.unsqueeze(1), each, torch.zeros_like(each)).sum(-1)
        terms.append(evidence + log_prior(z) - proposal.log_density(z))
    weights = torch.cat(terms, dim=1)
    total = torch.logsumexp(weights, dim=1)
    return total - math.log(samples), (2 * total - torch.logsumexp(2 * weights, dim=1)).exp()
