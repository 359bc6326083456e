"""MVTCAE (Hwang et al. 2021): q(z | x_S) is the product of the experts of S, without the prior."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.gaussian import kl, sample, standard_like
from model.vae.generative import Arrays
from model.vae.product import product
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.posteriors import GaussianPosterior, Posterior

ALPHA = 0.9  # share of the conditional bottleneck against that of the prior


class MVTCAE(ExpertRival):
    """Trained on their bound of the total correlation,

    (M - alpha)/M E_q[sum_m w_m log p(x_m | z)] - beta ((1 - alpha) KL(q || p) + alpha/M sum_m KL(q || q_m)),

    M being the modalities that the row has.
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [GaussianPosterior(product(experts, seen, "outside")) for seen in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        q = product(experts, batch.present, "outside")
        evidence = self.evidences(batch.arrays, batch.present, sample(q, self.noise(batch, generator)))[:, 0]
        to_prior = kl(q, standard_like(q))
        to_experts = kl(q, experts)
        to_experts = torch.where(batch.present.T, to_experts, 0.0).sum(0)
        count = batch.present.sum(1)
        bound = (count - ALPHA) / count * evidence
        bound = bound - self.beta * ((1 - ALPHA) * to_prior + ALPHA / count * to_experts)
        return -bound.mean(), {"elbo": (evidence - self.beta * to_prior).mean(), "bound": bound.mean()}
