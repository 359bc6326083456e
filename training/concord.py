"""Concord as a trainable model: the networks of ``MultimodalVAE`` with their training stages."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae.gaussian import Gaussian, antithetic, standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.multimodal import MultimodalVAE
from concord.training.config import Config
from concord.training.data.dataset import Batch
from concord.training.posteriors import FlowPosterior, GaussianPosterior, Posterior
from concord.training.stages import AlignStage, ContrastStage, FlowStage, JointStage, RefinerStage, RefreshStage
from concord.training.trainable import Stage, TrainableModel, network_sizes


class Concord(MultimodalVAE, TrainableModel):
    """Joint encoder, refiner and aligned encoder, trained in up to five stages."""

    refines: ClassVar[bool] = True
    exportable: ClassVar[bool] = True
    learns_prior: bool = False
    """Whether the flow, if there is one, learns the prior."""

    @classmethod
    def from_config(cls, modalities: Sequence[Modality], settings: Config) -> "Concord":
        model = cls(
            modalities,
            network_sizes(settings.network),
            beta=settings.objective.beta,
            fusion=settings.network.fusion,
            couplings=settings.flow.couplings if settings.flow.epochs else 0,
            spread=settings.flow.spread,
        )
        model.learns_prior = settings.flow.prior
        return model

    def stages(self, settings: Config) -> list[Stage]:
        refiner = settings.refiner
        by_class = settings.data.pairing == "class"
        plan: list[Stage] = [JointStage(settings.joint, self), RefinerStage(refiner, self)]
        if settings.contrast.epochs:
            plan.append(ContrastStage(settings.contrast, self, by_class))
        contrast = None
        if settings.align.contrast_weight:
            weight = (
                settings.align.contrast_weight * self.beta * len(self.modalities)
            )  # as the sum over modalities of the alignment
            contrast = ContrastStage(settings.contrast, self, by_class, weight)
        plan.append(AlignStage(settings.align, self, refiner, contrast, continues=settings.contrast.epochs > 0))
        if settings.refresh.epochs and refiner.steps:
            plan.append(RefreshStage(settings.refresh, self, refiner.model_copy(update={"steps": settings.horizon})))
        if settings.flow.epochs:
            plan.append(FlowStage(settings.flow, self, refiner, settings.horizon))
        return plan

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        """Return the posteriors of the aligned encoder, see ``TrainableModel.posteriors``."""
        features = self.aligned.features(arrays, torch.stack(list(masks)).any(0))
        gaussians = [self.aligned.fuse(features, mask) for mask in masks]
        return [GaussianPosterior(q) if self.flow is None else FlowPosterior(q, self.flow, self.spread) for q in gaussians]

    def sample_prior(self, noise: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """Return z of new rows of which nothing is known: samples of the flow if it learns the prior, else the noise."""
        if self.flow is None or not self.learns_prior:
            return noise
        return self.sample(Gaussian(torch.zeros_like(noise), torch.zeros_like(noise)), noise.unsqueeze(1))[:, 0]

    def log_prior(self, z: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample"]:
        """Return the log density of the samples of ``sample_prior``, in nats."""
        if self.flow is None or not self.learns_prior:
            return super().log_prior(z)
        prior = standard_like(Gaussian(z[:, 0], z[:, 0]))
        density: Tensor = FlowPosterior(prior, self.flow, self.spread).log_density(z)
        return density

    def joint_posterior(self, arrays: Arrays, present: Bool[Tensor, "batch modality"]) -> Gaussian:
        posterior: Gaussian = self.joint(arrays, present)
        return posterior

    def refinement_path(
        self, batch: Batch, start: Gaussian, anchor: Gaussian, steps: int, samples: int, generator: torch.Generator
    ) -> list[Gaussian]:
        noise = torch.randn(len(batch.present), samples // 2, self.latent, generator=generator)
        noise = antithetic(noise.to(batch.present.device))
        path = [start]
        for _ in range(steps):
            refined, _ = self.refine_step(batch.arrays, batch.present, path[-1], anchor, noise)
            path.append(refined)
        return path

    def bundle_model(self) -> MultimodalVAE:
        return self
