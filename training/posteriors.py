"""What every model says of a subset's posterior q(z | x_S), ours and the rivals': a mean, samples, a density.

Metrics ask nothing else of a model, so that all are measured by the same code.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.vae.flow import Flow
from model.vae.gaussian import Gaussian, sample
from model.vae.generative import Arrays, Generative
from model.vae.multimodal import MultimodalVAE


@runtime_checkable
class Posterior(Protocol):
    """q(z | x_S) of each row of a batch."""

    @property
    def mean(self) -> Float[Tensor, "batch latent"]:
        """E_q[z]: the embedding."""

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "batch sample latent"]:
        """Independent samples, at temperature 1."""

    def log_density(self, z: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample"]:
        """log q(z | x_S) in nats.

        Raises:
            NotImplementedError: the posterior can be sampled only.
        """


class GaussianPosterior:
    """One diagonal Gaussian a row."""

    def __init__(self, gaussian: Gaussian) -> None:
        self.gaussian = gaussian

    @property
    def mean(self) -> Tensor:
        return self.gaussian.mean

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(self.mean), count, self.mean.shape[-1], generator=generator)
        return sample(self.gaussian, noise)

    def log_density(self, z: Tensor) -> Tensor:
        return log_normal(z, Gaussian(self.gaussian.mean.unsqueeze(1), self.gaussian.log_var.unsqueeze(1)))


class FlowPosterior(GaussianPosterior):
    """A Gaussian, whose mean is the embedding, its samples drawn through a flow.

    Args:
        spread: standard deviation of the noise that the flow begins with.
    """

    def __init__(self, gaussian: Gaussian, flow: Flow, spread: float = 1.0) -> None:
        super().__init__(gaussian)
        self.flow, self.spread = flow, spread

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(self.mean), count, self.mean.shape[-1], generator=generator)
        drawn: Tensor = self.flow(self.gaussian, self.spread * noise)
        return drawn

    def log_density(self, z: Tensor) -> Tensor:
        noise, volume = self.flow.inverse(self.gaussian, z)
        return log_prior(noise / self.spread) + volume - z.shape[-1] * math.log(self.spread)


class MixturePosterior:
    """Gaussians of equal weight.

    Args:
        components: mean and log variance, each (component, batch, latent).
        among: which of them a row mixes; where it has none its posterior is the prior.
    """

    def __init__(self, components: Gaussian, among: Bool[Tensor, "component batch"]) -> None:
        nothing = ~among.any(0)
        self.components = Gaussian(*(torch.where(nothing.unsqueeze(-1), 0.0, part) for part in components))
        self.among = among | nothing

    @property
    def mean(self) -> Tensor:
        shares = self.among / self.among.sum(0)
        return (shares.unsqueeze(-1) * self.components.mean).sum(0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.among.T.float(), count, replacement=True, generator=generator)
        rows = torch.arange(len(chosen)).unsqueeze(1)
        mean, log_var = (part[chosen, rows] for part in self.components)
        return mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)

    def log_density(self, z: Tensor) -> Tensor:
        components = zip(*self.components, strict=True)
        each = torch.stack([GaussianPosterior(Gaussian(mean, log_var)).log_density(z) for mean, log_var in components])
        weights = torch.where(self.among, -self.among.sum(0).log(), -math.inf)
        return torch.logsumexp(each + weights.unsqueeze(-1), dim=0)


class Rival(Generative):
    """A model of another paper: says its posteriors itself."""

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        """q(z | x_S) for each mask of what is seen, the networks run once."""
        raise NotImplementedError


def posteriors(model: Generative, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
    """The posteriors that a model answers with, one for each mask of what is seen: ours those of the aligned encoder."""
    if isinstance(model, MultimodalVAE):
        features = model.aligned.features(arrays, torch.stack(list(masks)).any(0))
        fused = [model.aligned.fuse(features, seen) for seen in masks]
        return [GaussianPosterior(q) if model.flow is None else FlowPosterior(q, model.flow, model.spread) for q in fused]
    assert isinstance(model, Rival)
    return model.posteriors(arrays, masks)


def log_normal(z: Float[Tensor, "*batch latent"], of: Gaussian) -> Float[Tensor, "*batch"]:
    """Log density in nats of a diagonal Gaussian, summed over the latent axis."""
    return -0.5 * ((z - of.mean).square() * (-of.log_var).exp() + of.log_var + math.log(2 * math.pi)).sum(-1)


def log_prior(z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch"]:
    """Log density of N(0, I), in nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
