"""Posteriors q(z | x_S) of a subset S: a mean, samples and a density, the same interface for every model and metric."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.vae.flow import Flow
from concord.model.vae.gaussian import Gaussian, sample


@runtime_checkable
class Posterior(Protocol):
    """q(z | x_S) of each row of a batch."""

    @property
    def mean(self) -> Float[Tensor, "batch latent"]:
        """E_q[z], the embedding."""

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "batch sample latent"]:
        """Return independent samples. A flow scales their noise by its spread."""

    def log_density(self, z: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample"]:
        """Return log q(z | x_S) in nats.

        Raises:
            NotImplementedError: the density is not known.
        """


class GaussianPosterior:
    """A diagonal Gaussian for each row."""

    def __init__(self, gaussian: Gaussian) -> None:
        self.gaussian = gaussian

    @property
    def mean(self) -> Tensor:
        return self.gaussian.mean

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(self.mean), count, self.mean.shape[-1], generator=generator).to(self.mean.device)
        return sample(self.gaussian, noise)

    def log_density(self, z: Tensor) -> Tensor:
        return log_normal(z, Gaussian(self.gaussian.mean.unsqueeze(1), self.gaussian.log_var.unsqueeze(1)))


class FlowPosterior(GaussianPosterior):
    """A Gaussian whose mean is the embedding and whose samples a flow transforms.

    Args:
        gaussian: mean and log variance, each (batch, latent).
        flow: conditioned on ``gaussian``.
        spread: standard deviation of the base noise.
    """

    def __init__(self, gaussian: Gaussian, flow: Flow, spread: float = 1.0) -> None:
        super().__init__(gaussian)
        self.flow, self.spread = flow, spread

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(self.mean), count, self.mean.shape[-1], generator=generator).to(self.mean.device)
        samples: Tensor = self.flow(self.gaussian, self.spread * noise)
        return samples

    def log_density(self, z: Tensor) -> Tensor:
        noise, log_determinant = self.flow.inverse(self.gaussian, z)
        return log_prior(noise / self.spread) + log_determinant - z.shape[-1] * math.log(self.spread)


class MixturePosterior:
    """A mixture of Gaussians with equal weights.

    Args:
        components: mean and log variance, each (component, batch, latent).
        active: components in the mixture of each row. A row without active components has the prior.
    """

    def __init__(self, components: Gaussian, active: Bool[Tensor, "component batch"]) -> None:
        empty = ~active.any(0)
        self.components = Gaussian(*(torch.where(empty.unsqueeze(-1), 0.0, part) for part in components))
        self.active = active | empty

    @property
    def mean(self) -> Tensor:
        weights = self.active / self.active.sum(0)
        return (weights.unsqueeze(-1) * self.components.mean).sum(0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        device = self.active.device  # random numbers are sampled on the CPU, so they are the same on every device
        component = torch.multinomial(self.active.T.float().cpu(), count, replacement=True, generator=generator).to(device)
        rows = torch.arange(len(component), device=device).unsqueeze(1)
        mean, log_var = (part[component, rows] for part in self.components)
        return mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator).to(device)

    def log_density(self, z: Tensor) -> Tensor:
        components = zip(*self.components, strict=True)
        densities = torch.stack([GaussianPosterior(Gaussian(mean, log_var)).log_density(z) for mean, log_var in components])
        log_weights = torch.where(self.active, -self.active.sum(0).log(), -math.inf)
        return torch.logsumexp(densities + log_weights.unsqueeze(-1), dim=0)


def log_normal(z: Float[Tensor, "*batch latent"], of: Gaussian) -> Float[Tensor, "*batch"]:
    """Return the log density in nats of a diagonal Gaussian, summed over the latent axis."""
    return -0.5 * ((z - of.mean).square() * (-of.log_var).exp() + of.log_var + math.log(2 * math.pi)).sum(-1)


def log_prior(z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch"]:
    """Return the log density of N(0, I), in nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
