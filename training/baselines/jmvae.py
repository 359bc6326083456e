"""JMVAE-kl (Suzuki et al. 2017): a joint encoder, and experts aligned with it by KL(q(z | X) || q(z | x_m))."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae.gaussian import Gaussian, kl, standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.networks import NetworkSizes
from concord.model.vae.posterior import SetEncoder
from concord.model.vae.product_of_experts import product
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.data.dataset import Batch
from concord.training.posteriors import GaussianPosterior, Posterior

ALPHA = 0.1
"""Weight of the KL to the experts, relative to the KL of the ELBO."""


class JMVAE(ExpertBaseline):
    """Trained on the ELBO of the joint encoder - alpha beta sum_m KL(q(z | X) || q(z | x_m)) (their equation 6). The KL trains
    joint encoder and experts.

    The paper has two modalities: rows are complete or have one modality. Any other subset has the product of its experts
    divided by the surplus priors, the extension of Senellart et al. (2023).
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes, *, beta: float) -> None:
        super().__init__(modalities, sizes, beta=beta)
        self.joint = SetEncoder(modalities, sizes)

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts, features = self.experts(arrays), self.joint.features(arrays)
        posteriors: list[Posterior] = []
        for mask in masks:
            complete = mask.all(1, keepdim=True)
            pairs = zip(self.joint.fuse(features, mask), product(experts, mask, "divided"), strict=True)
            q = Gaussian(*(torch.where(complete, of_joint, of_product) for of_joint, of_product in pairs))
            posteriors.append(GaussianPosterior(q))
        return posteriors

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.joint(batch.arrays, batch.present)
        elbo = self.objective(batch.arrays, batch.present, q, standard_like(q), self.noise(batch, generator))
        experts = self.experts(batch.arrays)
        divergences = kl(q, experts)
        align = torch.where(batch.present.T, divergences, 0.0).sum(0)
        return (ALPHA * self.beta * align - elbo).mean(), {"elbo": elbo.mean(), "align": align.mean()}
