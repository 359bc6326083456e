"""JMVAE-kl (Suzuki et al. 2017): a joint encoder, and experts drawn to it by KL(q(z | X) || q(z | x_m))."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from model.modality import Modality
from model.vae.gaussian import Gaussian, kl, standard_like
from model.vae.generative import Arrays
from model.vae.posterior import SetEncoder
from model.vae.product import product
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.posteriors import GaussianPosterior, Posterior

ALPHA = 0.1  # weight of the experts' KL against the ELBO's


class JMVAE(ExpertRival):
    """Trained on the ELBO of the joint encoder - alpha beta sum_m KL(q(z | X) || q(z | x_m)) (their equation 6), both sides
    learning.

    The paper has two modalities, thus complete rows or single ones. What lies between is the product of experts with the spare
    priors divided out, as Senellart et al. (2023) extend it.
    """

    def __init__(
        self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int, beta: float
    ) -> None:
        super().__init__(modalities, latent=latent, features=features, hidden=hidden, width=width, beta=beta)
        self.joint = SetEncoder(modalities, latent=latent, features=features, hidden=hidden, width=width)

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts, features = self.experts(arrays), self.joint.features(arrays)
        found: list[Posterior] = []
        for seen in masks:
            complete = seen.all(1, keepdim=True)
            pairs = zip(self.joint.fuse(features, seen), product(experts, seen, "divided"), strict=True)
            found.append(GaussianPosterior(Gaussian(*(torch.where(complete, joint, other) for joint, other in pairs))))
        return found

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.joint(batch.arrays, batch.present)
        elbo = self.objective(batch.arrays, batch.present, q, standard_like(q), self.noise(batch, generator))
        experts = self.experts(batch.arrays)
        divergences = kl(q, experts)
        align = torch.where(batch.present.T, divergences, 0.0).sum(0)
        return (ALPHA * self.beta * align - elbo).mean(), {"elbo": elbo.mean(), "align": align.mean()}
