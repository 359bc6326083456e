"""JNF (Senellart et al. 2023): a joint VAE, then, with the VAE fixed, a conditional normalising flow for each modality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae.gaussian import sample, standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.networks import ModalityModules, NetworkSizes, encoder, initialise
from concord.model.vae.posterior import SetEncoder
from concord.training.baselines.flow import ConditionalFlow
from concord.training.baselines.hmc import hamiltonian
from concord.training.config import Config
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.posteriors import GaussianPosterior, Posterior, log_prior
from concord.training.trainable import Stage, TrainableModel, network_sizes

COUPLINGS = 8
HMC_STEPS = 20
"""Proposals of a chain that samples a product of flows."""
MEAN_SAMPLES = 4
"""Samples that estimate the mean of a flow, which has no closed form."""


class JNF(TrainableModel):
    """Stage 1: the ELBO of the joint encoder. Stage 2: sum_m E_{q(z | X)}[log q(z | x_m)], which trains the flows only.

    The posterior of a complete row is that of the joint encoder, the posterior of a single modality is its flow. For any other
    subset it is p(z)^(1 - |S|) prod_m q(z | x_m), sampled by Hamiltonian Monte Carlo as in the paper. The flows are affine
    couplings instead of masked autoregressive flows: fast to sample and to evaluate.

    Args:
        modalities: what the encoders read and the decoders generate.
        sizes: of the networks.
        beta: weight of the KL term.
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes, *, beta: float) -> None:
        super().__init__(modalities, latent=sizes.latent, beta=beta)
        self.joint = SetEncoder(modalities, sizes)
        self.build_decoders(sizes)
        self.trunks = ModalityModules({m.name: encoder(m, sizes) for m in modalities})
        for trunk in self.trunks.values():
            initialise(trunk)
        flow = {"latent": sizes.latent, "features": sizes.features, "hidden": sizes.hidden, "couplings": COUPLINGS}
        self._flows = ModalityModules({m.name: ConditionalFlow(**flow) for m in modalities})

    @classmethod
    def from_config(cls, modalities: Sequence[Modality], settings: Config) -> "JNF":
        return cls(modalities, network_sizes(settings.network), beta=settings.objective.beta)

    @property
    def flows(self) -> dict[str, ConditionalFlow]:
        """The flows by modality."""
        return cast(dict[str, ConditionalFlow], dict(self._flows.items()))

    def stages(self, settings: Config) -> list[Stage]:
        """Return two stages that share the epochs of Concord's stages: half for the joint VAE, the rest for the flows."""
        joint_epochs = settings.epochs // 2
        return [
            JointVAEStage(settings.joint.model_copy(update={"epochs": joint_epochs}), self),
            FlowsStage(settings.align.model_copy(update={"epochs": settings.epochs - joint_epochs}), self),
        ]

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        features = self.joint.features(arrays)
        contexts = {name: trunk(arrays[name]) for name, trunk in self.trunks.items()}
        posteriors: list[Posterior] = []
        for mask in masks:
            joint = GaussianPosterior(self.joint.fuse(features, mask))
            posteriors.append(joint if mask.all() else ProductOfFlows(self.flows, contexts, mask, joint))
        return posteriors

    def joint_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of stage 1, and figures to log."""
        q = self.joint(batch.arrays, batch.present)
        noise = torch.randn(len(batch.present), 1, self.latent, generator=generator).to(batch.present.device)
        elbo = self.objective(batch.arrays, batch.present, q, standard_like(q), noise).mean()
        return -elbo, {"elbo": elbo}

    def flow_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of stage 2, and figures to log. Its gradient reaches the trunks and flows of stage 2 only."""
        with torch.no_grad():
            q = self.joint(batch.arrays, batch.present)
            z = sample(q, torch.randn(len(batch.present), 1, self.latent, generator=generator).to(q.mean.device))
        total = torch.zeros((), device=z.device)
        for index, (name, flow) in enumerate(self.flows.items()):
            context = self.trunks[name](batch.arrays[name]).float()
            with torch.autocast(z.device.type, enabled=False):  # rounding errors of bfloat16 add up over the couplings
                density = flow.log_density(z, context)[:, 0]
            total = total + torch.where(batch.present[:, index], density, torch.zeros_like(density)).mean()
        return -total, {"log_density": total}


@dataclass(frozen=True)
class JointVAEStage(Stage):
    """Stage 1 of JNF. Needs the whole batch at once."""

    name: ClassVar[str] = "joint"
    model: JNF

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.joint_loss(batch, noise.generator)


@dataclass(frozen=True)
class FlowsStage(Stage):
    """Stage 2 of JNF. Needs the whole batch at once."""

    name: ClassVar[str] = "flows"
    model: JNF

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.flow_loss(batch, noise.generator)


class ProductOfFlows:
    """p(z)^(1 - |S|) prod_{m in S} q(z | x_m), where S are the modalities of each row. For complete rows: ``joint``.

    Args:
        flows: by modality.
        contexts: inputs of the flows by modality, each (batch, feature).
        present: S of each row.
        joint: posterior of the joint encoder.
    """

    def __init__(
        self,
        flows: dict[str, ConditionalFlow],
        contexts: dict[str, Tensor],
        present: Bool[Tensor, "batch modality"],
        joint: GaussianPosterior,
    ) -> None:
        self.flows, self.contexts, self.present, self.joint = flows, contexts, present, joint

    @property
    def mean(self) -> Tensor:
        return self.sample(MEAN_SAMPLES, torch.Generator().manual_seed(0)).mean(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return samples.

        For rows with several but not all modalities: states of Hamiltonian chains that start at samples of one of the flows.
        """
        # Rows without modalities keep these samples of the prior.
        device = self.present.device
        z = torch.randn(len(self.present), count, self.joint.mean.shape[1], generator=generator).to(device)
        start = (torch.rand(self.present.shape, generator=generator).to(device) * self.present).argmax(1)
        for index, (name, flow) in enumerate(self.flows.items()):
            rows = self.present[:, index] & (start == index)
            z[rows] = flow.sample(z[rows], self.contexts[name][rows]).detach()
        if (multimodal := self.present.sum(1) > 1).any():
            contexts = {name: context[multimodal].detach() for name, context in self.contexts.items()}

            def log_density(z: Tensor) -> Tensor:
                return _log_product(self.flows, contexts, self.present[multimodal], z)

            z[multimodal] = hamiltonian(log_density, z[multimodal], generator, steps=HMC_STEPS)
        complete = self.present.all(1)
        return torch.where(complete.view(-1, 1, 1), self.joint.sample(count, generator), z)

    def log_density(self, z: Float[Tensor, "batch sample latent"]) -> Tensor:
        complete = self.present.all(1)
        if bool(((self.present.sum(1) > 1) & ~complete).any()):
            raise NotImplementedError("the density of a product of flows is known up to a factor only")
        unimodal = _log_product(self.flows, self.contexts, self.present, z)
        return torch.where(complete.unsqueeze(1), self.joint.log_density(z), unimodal)


def _log_product(flows: dict[str, ConditionalFlow], contexts: dict[str, Tensor], present: Tensor, z: Tensor) -> Tensor:
    """Return the log density of ``ProductOfFlows``, unnormalised."""
    total = (1 - present.sum(1)).unsqueeze(1) * log_prior(z)
    for index, (name, flow) in enumerate(flows.items()):
        if (rows := present[:, index]).any():
            total = total + torch.where(rows.unsqueeze(1), flow.log_density(z, contexts[name]), 0.0)
    return total
