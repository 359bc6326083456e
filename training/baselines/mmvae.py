"""MMVAE (Shi et al. 2019): q(z | x_S) is the mixture of the experts of S, with equal weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.vae.generative import Arrays
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.data.dataset import Batch
from concord.training.posteriors import MixturePosterior, Posterior, log_prior


class MMVAE(ExpertBaseline):
    """Trained on the stratified ELBO, 1/M sum_m E_{q_m}[sum_n w_n log p(x_n | z) + beta (log p(z) - log q(z | X))], with one
    sample of every expert.

    Two differences from the paper, for equal terms: experts are Gaussian instead of Laplace, like all other posteriors here.
    The bound is the ELBO (their equation 3 with one sample per stratum), because the importance-weighted bound is not defined
    for weighted likelihoods and a beta other than 1.
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [MixturePosterior(experts, mask.T) for mask in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        mean, log_var = experts.mean.transpose(0, 1), experts.log_var.transpose(0, 1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        z = mean + (0.5 * log_var).exp() * noise  # one stratum for each expert
        log_ratio = log_prior(z) - MixturePosterior(experts, batch.present.T).log_density(z)
        by_expert = self.weighted_log_likelihood(batch.arrays, batch.present, z) + self.beta * log_ratio
        elbo = torch.where(batch.present, by_expert, torch.zeros_like(by_expert)).sum(1) / batch.present.sum(1)
        return -elbo.mean(), {"elbo": elbo.mean()}
