"""MVTCAE (Hwang et al. 2021): q(z | x_S) is the product of the experts of S, without the prior."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.vae.gaussian import kl, sample, standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.product_of_experts import product
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.data.dataset import Batch
from concord.training.posteriors import GaussianPosterior, Posterior

ALPHA = 0.9
"""Weight of the conditional bottleneck; the bottleneck of the prior has 1 - ALPHA."""


class MVTCAE(ExpertBaseline):
    """Trained on their bound of the total correlation,

    (M - alpha)/M E_q[sum_m w_m log p(x_m | z)] - beta ((1 - alpha) KL(q || p) + alpha/M sum_m KL(q || q_m)),

    where M is the number of modalities of the row.
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [GaussianPosterior(product(experts, mask, "outside")) for mask in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        q = product(experts, batch.present, "outside")
        z = sample(q, self.noise(batch, generator))
        reconstruction = self.weighted_log_likelihood(batch.arrays, batch.present, z)[:, 0]
        to_prior = kl(q, standard_like(q))
        to_experts = kl(q, experts)
        to_experts = torch.where(batch.present.T, to_experts, 0.0).sum(0)
        count = batch.present.sum(1)
        bound = (count - ALPHA) / count * reconstruction
        bound = bound - self.beta * ((1 - ALPHA) * to_prior + ALPHA / count * to_experts)
        return -bound.mean(), {"elbo": (reconstruction - self.beta * to_prior).mean(), "bound": bound.mean()}
