"""Contrastive learning with one network for each modality, as CLIP (Radford et al. 2021): the usual choice for a search."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from concord.model.modality import BinaryModality, Modality, VectorModality
from concord.model.vae.gaussian import Gaussian, sample
from concord.model.vae.generative import Arrays
from concord.model.vae.networks import NetworkSizes
from concord.model.vae.posterior import SetEncoder
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.config import Config
from concord.training.data.dataset import Batch, Dataset
from concord.training.distributed import Noise
from concord.training.objectives import contrastive_loss
from concord.training.posteriors import GaussianPosterior, Posterior
from concord.training.trainable import Stage

LOG_VAR = -4.0
"""Log variance of every posterior: the method has none, and samples should decode like the embedding."""


class Contrastive(ExpertBaseline):
    """Stage 1: InfoNCE between the embeddings of every two modalities, with a learned temperature. Stage 2: the decoders, from
    the embedding of one random modality of each row, with the encoders fixed.

    The embedding of several modalities is the mean of their embeddings. Embeddings have the length of a sample of the prior,
    and the encoders are shallow in any case: with more layers they retrieve worse.
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes, *, beta: float) -> None:
        super().__init__(modalities, replace(sizes, shallow=True), beta=beta)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.dropout = 0.5

    @classmethod
    def from_config(cls, modalities: Sequence[Modality], settings: Config) -> "Contrastive":
        model = super().from_config(modalities, settings)
        assert isinstance(model, Contrastive)
        model.dropout = settings.contrast.dropout
        return model

    def stages(self, settings: Config) -> list[Stage]:
        """Return two stages that share the epochs of Concord's stages, unless ``[contrast]`` sets those of the first one.

        Rows with a single modality have nothing to contrast, so an epoch of the first stage can be much shorter than others.
        """
        half = settings.epochs // 2
        own = settings.contrast
        contrast = own if own.epochs else settings.joint.model_copy(update={"epochs": half})
        decoders = settings.align.model_copy(update={"epochs": settings.epochs - half})
        return [PairsStage(contrast, self), DecodersStage(decoders, self)]

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        means = self.embeddings(arrays)
        gaussians = [_mean_embedding(means, mask) for mask in masks]
        return [GaussianPosterior(gaussian) for gaussian in gaussians]

    def embeddings(self, arrays: Arrays, generator: torch.Generator | None = None) -> Float[Tensor, "modality batch latent"]:
        """Return the embedding of every single modality. Those of absent modalities are meaningless.

        Args:
            generator: of dropout, on the inputs of vectors and attributes and on all features. None: no dropout.
        """
        embeddings = []
        for modality, expert in zip(self.modalities, self.experts.values(), strict=True):
            assert isinstance(expert, SetEncoder)
            x = arrays[modality.name]
            present = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
            if isinstance(modality, VectorModality | BinaryModality):
                x = self._dropped(x, generator)
            features = self._dropped(expert.features({modality.name: x}), generator)
            mean = nn.functional.normalize(expert.fuse(features, present).mean, dim=-1)
            embeddings.append(mean * math.sqrt(self.latent))
        return torch.stack(embeddings)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of stage 1, and figures to log."""
        embeddings = self.embeddings(batch.arrays, generator)
        loss = contrastive_loss(embeddings, batch.present, self.log_temperature.exp())
        return loss, {"contrast": loss, "temperature": self.log_temperature.exp()}

    def decoder_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of stage 2, and figures to log. Its gradient reaches the decoders only."""
        with torch.no_grad():
            scores = (
                torch.rand(batch.present.shape, generator=generator).to(batch.present.device).masked_fill(~batch.present, -1.0)
            )
            chosen = nn.functional.one_hot(scores.argmax(1), len(self.modalities)).bool()
            q = _mean_embedding(self.embeddings(batch.arrays), chosen)
            noise = torch.randn(len(batch.present), 1, self.latent, generator=generator)
            z = sample(q, noise.to(batch.present.device))
        log_likelihood = self.weighted_log_likelihood(batch.arrays, batch.present, z).mean()
        return -log_likelihood, {"log_likelihood": log_likelihood}

    def _dropped(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.dropout:
            return values
        kept = torch.rand(values.shape, generator=generator).to(values.device) >= self.dropout
        return values * kept / (1 - self.dropout)


def _mean_embedding(embeddings: Float[Tensor, "modality batch latent"], mask: Bool[Tensor, "batch modality"]) -> Gaussian:
    """Return the posterior of the modalities in ``mask``. A row without any has the prior."""
    chosen = mask.T.unsqueeze(-1)
    count = mask.sum(1, keepdim=True)
    mean = torch.where(chosen, embeddings, 0.0).sum(0) / count.clamp(min=1)
    return Gaussian(mean, torch.where(count > 0, LOG_VAR, 0.0).expand_as(mean))


@dataclass(frozen=True)
class PairsStage(Stage):
    """Stage 1 of ``Contrastive``. Needs the whole batch at once."""

    name: ClassVar[str] = "contrast"
    model: Contrastive

    def rows(self, data: Dataset) -> Dataset:
        return data.with_pairs()

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch, noise.generator)


@dataclass(frozen=True)
class DecodersStage(Stage):
    """Stage 2 of ``Contrastive``. Needs the whole batch at once."""

    name: ClassVar[str] = "decoders"
    model: Contrastive

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.decoder_loss(batch, noise.generator)
