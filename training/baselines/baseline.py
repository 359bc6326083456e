"""What most baselines share: one encoder (expert) for each modality, and a single training stage."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.generative import Arrays
from concord.model.vae.networks import ModalityModules, NetworkSizes
from concord.model.vae.posterior import SetEncoder
from concord.training.config import Config
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.trainable import Stage, TrainableModel, network_sizes


class Experts(ModalityModules):
    """q(z | x_m) of each modality, from a ``SetEncoder`` over this modality: trunk and head are those of Concord."""

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes) -> None:
        super().__init__({m.name: SetEncoder([m], sizes) for m in modalities})

    def forward(self, arrays: Arrays) -> Gaussian:
        """Return mean and log variance, each (modality, batch, latent). Those of absent modalities are meaningless."""
        experts = []
        for name, expert in self.items():
            present = torch.ones(len(arrays[name]), 1, dtype=torch.bool, device=arrays[name].device)
            experts.append(expert(arrays, present))
        return Gaussian(torch.stack([q.mean for q in experts]), torch.stack([q.log_var for q in experts]))


class ExpertBaseline(TrainableModel):
    """A baseline with one expert and one decoder for each modality.

    Args:
        modalities: what the experts read and the decoders generate.
        sizes: of the networks.
        beta: weight of the KL term.
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes, *, beta: float) -> None:
        super().__init__(modalities, latent=sizes.latent, beta=beta)
        self.experts = Experts(modalities, sizes)
        self.build_decoders(sizes)

    @classmethod
    def from_config(cls, modalities: Sequence[Modality], settings: Config) -> "ExpertBaseline":
        return cls(modalities, network_sizes(settings.network), beta=settings.objective.beta)

    def stages(self, settings: Config) -> list[Stage]:
        """Return one stage, with the epochs of Concord's stages together."""
        return [ExpertStage(settings.joint.model_copy(update={"epochs": settings.epochs}), self)]

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a mean over the rows, and figures to log, scalars in (weighted) nats."""

    def noise(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return one sample of standard normal noise for each row: (batch, 1, latent)."""
        return torch.randn(len(batch.present), 1, self.latent, generator=generator).to(batch.present.device)


@dataclass(frozen=True)
class ExpertStage(Stage):
    """Minimises the loss of an ``ExpertBaseline``. Needs the whole batch at once."""

    name: ClassVar[str] = "joint"
    model: ExpertBaseline

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch, noise.generator)
