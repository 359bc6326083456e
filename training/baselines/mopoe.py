"""MoPoE (Sutter et al. 2021): q(z | x_S) is the mixture, in equal shares, of the products of experts of all subsets of S."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.gaussian import Gaussian, kl, standard_like
from model.vae.generative import Arrays
from model.vae.product import product
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.objectives import every_subset
from training.posteriors import MixturePosterior, Posterior


class MoPoE(ExpertRival):
    """Trained on their lower bound of the ELBO (lemma 1 and equation 9): one sample of the mixture, and the mean of the
    components' KL to the prior, which is no less than that of the mixture. Products are without the prior (their equation 10).
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [self._mixture(experts, seen) for seen in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        mixture = self._mixture(self.experts(batch.arrays), batch.present)
        evidence = self.evidences(batch.arrays, batch.present, mixture.sample(1, generator))[:, 0]
        divergences = kl(mixture.components, standard_like(mixture.components))
        divergence = torch.where(mixture.among, divergences, 0.0).sum(0) / mixture.among.sum(0)
        elbo = evidence - self.beta * divergence
        return -elbo.mean(), {"elbo": elbo.mean()}

    def _mixture(self, experts: Gaussian, seen: Bool[Tensor, "batch modality"]) -> MixturePosterior:
        subsets = every_subset(len(self.modalities))
        products = [product(experts, subset.expand(seen.shape), "outside") for subset in subsets]
        components = Gaussian(torch.stack([q.mean for q in products]), torch.stack([q.log_var for q in products]))
        among = (seen | ~subsets.unsqueeze(1)).all(-1)  # a component needs all of its own modalities
        return MixturePosterior(components, among)
