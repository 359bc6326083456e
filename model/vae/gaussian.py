"""Diagonal Gaussians over z, as pairs of tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_VAR_RANGE = (-8.0, 4.0)
"""Outside it a variance is a numerical accident, and a collapsed student would make the alignment KL explode."""


class Gaussian(NamedTuple):
    """N(mean, diag(exp(log_var))) for each row; both (..., latent), in nats where logarithms are taken."""

    mean: Tensor
    log_var: Tensor

    def detach(self) -> "Gaussian":
        """The same distribution, cut from the graph."""
        return Gaussian(self.mean.detach(), self.log_var.detach())


def bounded(mean: Float[Tensor, "*batch latent"], log_var: Float[Tensor, "*batch latent"]) -> Gaussian:
    """A Gaussian whose log variance is clamped to LOG_VAR_RANGE."""
    return Gaussian(mean, log_var.clamp(*LOG_VAR_RANGE))


def standard_like(posterior: Gaussian) -> Gaussian:
    """The prior N(0, I), shaped as ``posterior``."""
    return Gaussian(torch.zeros_like(posterior.mean), torch.zeros_like(posterior.log_var))


def served_anchor(start: Gaussian, present: Bool[Tensor, "batch modality"]) -> Gaussian:
    """What the service holds refinement to: the prior where nothing is missing, else the start."""
    complete = present.all(1, keepdim=True)
    return Gaussian(*(torch.where(complete, prior, own) for prior, own in zip(standard_like(start), start, strict=True)))


def sample(posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
    """Reparameterised samples mean + sigma * noise (Kingma & Welling 2014, equation 10)."""
    return posterior.mean.unsqueeze(-2) + (0.5 * posterior.log_var).exp().unsqueeze(-2) * noise


def kl(q: Gaussian, p: Gaussian) -> Float[Tensor, "*batch"]:
    """KL(q || p) of each row, in nats, summed over the latent axis."""
    ratio = (q.log_var - p.log_var).exp()
    distance = (q.mean - p.mean).square() * (-p.log_var).exp()
    return 0.5 * (ratio + distance - 1 - q.log_var + p.log_var).sum(-1)


def antithetic(noise: Float[Tensor, "batch half latent"]) -> Float[Tensor, "batch sample latent"]:
    """Each noise sample beside its negative: odd terms of the estimate's error cancel."""
    return torch.stack((noise, -noise), dim=2).flatten(1, 2)
