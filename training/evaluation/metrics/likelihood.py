"""log p(x_S) of the generative model by importance sampling (Burda et al. 2016, equation 8).

In plain nats, without likelihood weights and beta, so that models with different objectives can be compared.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.vae.gaussian import Gaussian, sample
from concord.training.evaluation.metrics.gap import best_gaussian
from concord.training.posteriors import GaussianPosterior, Posterior
from concord.training.trainable import TrainableModel

CHUNK = 16
"""Samples decoded per step."""
START_LOG_VAR, ADAM_SAMPLES = -2.0, 2
"""Where Adam starts, for every model, and its noise samples per step."""


def best_proposal(
    model: TrainableModel,
    arrays: Mapping[str, Tensor],
    present: Bool[Tensor, "batch modality"],
    start: Float[Tensor, "batch latent"],
    generator: torch.Generator,
) -> GaussianPosterior:
    """Return the Gaussian of each row that maximises its ELBO in plain nats, by Adam.

    It is found in the same way for every model, so the bounds of models with different posteriors can be compared. The
    posterior of a model is trained with likelihood weights and beta, and is therefore a poor proposal for plain nats.

    Args:
        present: S, the modalities of the ELBO.
        start: the mean from which Adam starts.

    Returns:
        mean and log variance, each (batch, latent). Source of the search by row: Cremer et al. 2018.
    """

    def elbo(q: Gaussian, noise: Tensor) -> Tensor:
        """Up to a constant of the entropy."""
        return _log_joint(model, arrays, present, sample(q, noise)).mean(1) + 0.5 * q.log_var.sum(-1)

    return GaussianPosterior(
        best_gaussian(elbo, Gaussian(start, torch.full_like(start, START_LOG_VAR)), generator, ADAM_SAMPLES)
    )


def log_likelihood(
    model: TrainableModel,
    arrays: Mapping[str, Tensor],
    present: Bool[Tensor, "batch modality"],
    proposal: Posterior,
    samples: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """log 1/K sum_k p(x_S | z_k) p(z_k) / q(z_k | x_S), z_k ~ q, of each row.

    Its expectation is a lower bound that rises with K. The effective sample size shows how tight the bound is.

    Args:
        present: S.
        proposal: q, the posterior of any subset. The posterior of S gives the tightest bound.
        samples: K.

    Returns:
        the estimate in nats, and the effective sample size (sum w)^2 / sum w^2, between 1 and K.
    """
    terms = []
    for done in range(0, samples, CHUNK):
        z = proposal.sample(min(CHUNK, samples - done), generator)
        terms.append(_log_joint(model, arrays, present, z) - proposal.log_density(z))
    log_weights = torch.cat(terms, dim=1)
    total = torch.logsumexp(log_weights, dim=1)
    return total - math.log(samples), (2 * total - torch.logsumexp(2 * log_weights, dim=1)).exp()


def _log_joint(
    model: TrainableModel,
    arrays: Mapping[str, Tensor],
    present: Bool[Tensor, "batch modality"],
    z: Float[Tensor, "batch sample latent"],
) -> Float[Tensor, "batch sample"]:
    """log p(x_S, z)."""
    by_modality = model.log_likelihoods(arrays, z)
    return torch.where(present.unsqueeze(1), by_modality, torch.zeros_like(by_modality)).sum(-1) + model.log_prior(z)
