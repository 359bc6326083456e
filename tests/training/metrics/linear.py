"""A linear Gaussian model: every posterior, likelihood and gap of it is known."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from model.modality import VectorModality
from model.vae.gaussian import Gaussian
from training.data import Batch
from training.posteriors import GaussianPosterior, Posterior, Rival

LATENT, SIZE = 2, 3
STD = 0.5


class Linear(Rival):
    """x_m = W_m z + STD noise, for two vectors. The columns of each W_m are orthogonal: posteriors are diagonal."""

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

    def posteriors(self, arrays: Any, masks: Sequence[Tensor]) -> list[Posterior]:
        found: list[Posterior] = []
        for seen in masks:
            precision, pull = torch.ones(len(seen), LATENT), torch.zeros(len(seen), LATENT)
            for m, (name, weight) in enumerate(zip("ab", self.maps, strict=True)):
                here = seen[:, m : m + 1]
                precision = precision + here * weight.square().sum(0) / STD**2
                pull = pull + here * (arrays[name] @ weight) / STD**2
            found.append(GaussianPosterior(Gaussian(pull / precision, -precision.log())))
        return found

    def batch(self, rows: int, seed: int = 1) -> Batch:
        """Complete rows of the model itself."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, LATENT, generator=generator)
        arrays = {n: z @ w.T + STD * torch.randn(rows, SIZE, generator=generator) for n, w in zip("ab", self.maps, strict=True)}
        return Batch(arrays, torch.ones(rows, 2, dtype=torch.bool), None)

    def evidence(self, arrays: Any, seen: Sequence[int]) -> Tensor:
        """log p(x_S) in nats, of each row."""
        weight = torch.cat([self.maps[m] for m in seen])
        covariance = weight @ weight.T + STD**2 * torch.eye(len(weight))
        rows = torch.cat([arrays["ab"[m]] for m in seen], dim=1)
        return MultivariateNormal(torch.zeros(len(weight)), covariance).log_prob(rows)
