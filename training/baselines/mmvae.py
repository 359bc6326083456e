"""MMVAE (Shi et al. 2019): q(z | x_S) is the mixture of the experts of S, in equal shares."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.generative import Arrays
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.posteriors import MixturePosterior, Posterior, log_prior


class MMVAE(ExpertRival):
    """Trained on the stratified ELBO, 1/M sum_m E_{q_m}[sum_n w_n log p(x_n | z) + beta (log p(z) - log q(z | X))], with one
    sample of every expert.

    Two departures from the paper, for equal terms: experts are Gaussian and not Laplace, as every other posterior here; and the
    bound is the ELBO (their equation 3 with one sample a stratum), since the importance-weighted bound has no counterpart with
    weighted likelihoods and a beta other than 1.
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [MixturePosterior(experts, seen.T) for seen in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        mean, log_var = experts.mean.transpose(0, 1), experts.log_var.transpose(0, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)  # a stratum of every expert
        ratio = log_prior(z) - MixturePosterior(experts, batch.present.T).log_density(z)
        each = self.evidences(batch.arrays, batch.present, z) + self.beta * ratio
        elbo = torch.where(batch.present, each, torch.zeros_like(each)).sum(1) / batch.present.sum(1)
        return -elbo.mean(), {"elbo": elbo.mean()}
