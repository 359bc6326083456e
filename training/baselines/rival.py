"""What the rivals share: an encoder of its own for each modality."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.modality import Modality
from model.vae.gaussian import Gaussian
from model.vae.generative import Arrays
from model.vae.posterior import SetEncoder
from training.data import Batch
from training.posteriors import Rival


class Experts(nn.ModuleDict):
    """q(z | x_m) of each modality alone: ``SetEncoder`` over one modality, which is our trunk and our head."""

    def __init__(self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int) -> None:
        sizes = {"latent": latent, "features": features, "hidden": hidden, "width": width}
        super().__init__({m.name: SetEncoder([m], **sizes) for m in modalities})

    def forward(self, arrays: Arrays) -> Gaussian:
        """Mean and log variance, each (modality, batch, latent); those of absent modalities mean nothing."""
        experts = []
        for name, expert in self.items():
            alone = torch.ones(len(arrays[name]), 1, dtype=torch.bool)
            experts.append(expert(arrays, alone))
        return Gaussian(torch.stack([q.mean for q in experts]), torch.stack([q.log_var for q in experts]))


class ExpertRival(Rival):
    """Experts and decoders.

    Args:
        features, hidden, width: see ``SetEncoder`` and ``networks.decoder``.
    """

    def __init__(
        self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int, beta: float
    ) -> None:
        super().__init__(modalities, latent=latent, beta=beta)
        self.experts = Experts(modalities, latent=latent, features=features, hidden=hidden, width=width)
        self.build_decoders(hidden=hidden, width=width)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """What training minimises, a mean over rows, and the figures to log: scalars in (weighted) nats."""
        raise NotImplementedError

    def noise(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Standard normal, one sample a row: (batch, 1, latent)."""
        return torch.randn(len(batch.present), 1, self.latent, generator=generator)
