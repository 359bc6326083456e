"""MVAE (Wu & Goodman 2018): q(z | x_S) is the product of the experts of S and the prior."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.vae.gaussian import standard_like
from concord.model.vae.generative import Arrays
from concord.model.vae.product_of_experts import product
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.data.dataset import Batch
from concord.training.objectives import every_subset
from concord.training.posteriors import GaussianPosterior, Posterior


class MVAE(ExpertBaseline):
    """Trained by sub-sampling (their equation 4): the ELBOs of all modalities, of each single one and of one other subset."""

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [GaussianPosterior(product(experts, mask, "inside")) for mask in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        total, figures = torch.zeros((), device=batch.present.device), {}
        for index, subset in enumerate(self._subsets(len(batch.present), generator)):
            present = batch.present & subset.to(batch.present.device)
            q = product(experts, present, "inside")
            elbo = self.objective(batch.arrays, present, q, standard_like(q), self.noise(batch, generator))
            elbo = torch.where(present.any(1), elbo, torch.zeros_like(elbo)).mean()
            total = total - elbo
            if index == 0:
                figures["elbo"] = elbo
        return total, figures

    def _subsets(self, rows: int, generator: torch.Generator) -> list[Tensor]:
        """Return masks: all modalities, each single one, and, if there are other subsets, a random one of them for each row."""
        *partial, everything = every_subset(len(self.modalities))
        singles, others = partial[: len(self.modalities)], partial[len(self.modalities) :]
        if others:  # empty for two modalities
            others = [torch.stack(others)[torch.randint(len(others), (rows,), generator=generator)]]
        return [everything, *singles, *others]
