"""A linear Gaussian model, whose posteriors, likelihoods and amortization gap are known in closed form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from concord.model.modality import VectorModality
from concord.model.vae.gaussian import Gaussian
from concord.training.data.dataset import Batch
from concord.training.posteriors import GaussianPosterior, Posterior
from concord.training.trainable import Stage, TrainableModel

LATENT, SIZE = 2, 3
STD = 0.5


class Linear(TrainableModel):
    """x_m = W_m z + STD noise, for two vectors a and b. The columns of each W_m are orthogonal, so posteriors are diagonal."""

    def __init__(self) -> None:
        modalities = [
            VectorModality(name=name, size=SIZE, mean=(0.0,) * SIZE, std=(1.0,) * SIZE, scale=STD, weight=1.0) for name in "ab"
        ]
        super().__init__(modalities, latent=LATENT, beta=1.0)
        generator = torch.Generator().manual_seed(0)
        self.maps = []
        for scales in ((1.0, 0.3), (0.5, 1.5)):
            axes = torch.linalg.qr(torch.randn(SIZE, LATENT, generator=generator)).Q
            self.maps.append(axes * torch.tensor(scales))
        self.decoders = nn.ModuleDict({name: nn.Linear(LATENT, SIZE, bias=False) for name in "ab"})
        for decoder, weight in zip(self.decoders.values(), self.maps, strict=True):
            decoder.weight.data.copy_(weight)
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, modalities: Any, settings: Any) -> "Linear":
        raise NotImplementedError

    def stages(self, settings: Any) -> list[Stage]:
        raise NotImplementedError

    def posteriors(self, arrays: Any, masks: Sequence[Tensor]) -> list[Posterior]:
        posteriors: list[Posterior] = []
        for mask in masks:
            precision, weighted_mean = torch.ones(len(mask), LATENT), torch.zeros(len(mask), LATENT)
            for m, (name, weight) in enumerate(zip("ab", self.maps, strict=True)):
                present = mask[:, m : m + 1]
                precision = precision + present * weight.square().sum(0) / STD**2
                weighted_mean = weighted_mean + present * (arrays[name] @ weight) / STD**2
            posteriors.append(GaussianPosterior(Gaussian(weighted_mean / precision, -precision.log())))
        return posteriors

    def batch(self, rows: int, seed: int = 1) -> Batch:
        """Return complete rows sampled from the model."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, LATENT, generator=generator)
        arrays = {n: z @ w.T + STD * torch.randn(rows, SIZE, generator=generator) for n, w in zip("ab", self.maps, strict=True)}
        return Batch(arrays, torch.ones(rows, 2, dtype=torch.bool), None)

    def log_marginal_likelihood(self, arrays: Any, subset: Sequence[int]) -> Tensor:
        """Return log p(x_S) of each row in nats.

        Args:
            subset: S, indices of modalities.
        """
        weight = torch.cat([self.maps[m] for m in subset])
        covariance = weight @ weight.T + STD**2 * torch.eye(len(weight))
        rows = torch.cat([arrays["ab"[m]] for m in subset], dim=1)
        return MultivariateNormal(torch.zeros(len(weight)), covariance).log_prob(rows)
