"""Diagonal Gaussians over z."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_VAR_RANGE = (-8.0, 4.0)
"""Log variances are clamped to this range, because values outside are numerical artefacts: a collapsed posterior of the aligned
encoder would make the alignment KL explode."""


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_var))) for each row. Both tensors are (..., latent); ``log_var`` is a natural logarithm."""

    mean: Tensor
    log_var: Tensor

    def detach(self) -> "Gaussian":
        """The same distribution, detached from the autograd graph."""
        return Gaussian(self.mean.detach(), self.log_var.detach())


def bounded(mean: Float[Tensor, "*batch latent"], log_var: Float[Tensor, "*batch latent"]) -> Gaussian:
    """A Gaussian whose log variance is clamped to LOG_VAR_RANGE."""
    return Gaussian(mean, log_var.clamp(*LOG_VAR_RANGE))


def standard_like(posterior: Gaussian) -> Gaussian:
    """The prior N(0, I) in the shape of ``posterior``."""
    return Gaussian(torch.zeros_like(posterior.mean), torch.zeros_like(posterior.log_var))


def refinement_anchor(start: Gaussian, present: Bool[Tensor, "batch modality"]) -> Gaussian:
    """Anchor of the KL term in refinement, as the service uses it: the prior for rows with all modalities, else ``start``."""
    complete = present.all(1, keepdim=True)
    return Gaussian(*(torch.where(complete, prior, first) for prior, first in zip(standard_like(start), start, strict=True)))


def sample(posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
    """Reparameterised samples mean + sigma * noise, from standard normal noise (Kingma & Welling 2014, equation 10)."""
    return posterior.mean.unsqueeze(-2) + (0.5 * posterior.log_var).exp().unsqueeze(-2) * noise


def kl(q: Gaussian, p: Gaussian) -> Float[Tensor, "*batch"]:
    """KL(q || p) of each row in nats, summed over the latent axis."""
    ratio = (q.log_var - p.log_var).exp()
    distance = (q.mean - p.mean).square() * (-p.log_var).exp()
    return 0.5 * (ratio + distance - 1 - q.log_var + p.log_var).sum(-1)


def antithetic(noise: Float[Tensor, "batch half latent"]) -> Float[Tensor, "batch sample latent"]:
    """Antithetic pairs: each noise sample followed by its negative. Odd-order error terms of the estimate cancel."""
    return torch.stack((noise, -noise), dim=2).flatten(1, 2)
