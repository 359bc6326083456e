"""MoPoE (Sutter et al. 2021): q(z | x_S) is the mixture, with equal weights, of the products of experts of all subsets of S."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.vae.gaussian import Gaussian, kl, standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.product_of_experts import product
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.data.dataset import Batch
from concord.training.objectives import every_subset
from concord.training.posteriors import MixturePosterior, Posterior


class MoPoE(ExpertBaseline):
    """Trained on the lower bound of the ELBO in the paper (lemma 1 and equation 9): one sample of the mixture, and the mean KL
    of its components to the prior, an upper bound of the mixture's KL. Products exclude the prior (equation 10).
    """

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [self._mixture(experts, mask) for mask in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        mixture = self._mixture(self.experts(batch.arrays), batch.present)
        z = mixture.sample(1, generator)
        reconstruction = self.weighted_log_likelihood(batch.arrays, batch.present, z)[:, 0]
        divergences = kl(mixture.components, standard_like(mixture.components))
        divergence = torch.where(mixture.active, divergences, 0.0).sum(0) / mixture.active.sum(0)
        elbo = reconstruction - self.beta * divergence
        return -elbo.mean(), {"elbo": elbo.mean()}

    def _mixture(self, experts: Gaussian, present: Bool[Tensor, "batch modality"]) -> MixturePosterior:
        subsets = every_subset(len(self.modalities)).to(present.device)
        products = [product(experts, subset.expand(present.shape), "outside") for subset in subsets]
        components = Gaussian(torch.stack([q.mean for q in products]), torch.stack([q.log_var for q in products]))
        active = (present | ~subsets.unsqueeze(1)).all(-1)  # the components whose modalities are all present
        return MixturePosterior(components, active)
