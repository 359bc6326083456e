"""MVAE (Wu & Goodman 2018): q(z | x_S) is the product of experts with the prior inside."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.gaussian import standard_like
from model.vae.generative import Arrays
from model.vae.product import product
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.objectives import every_subset
from training.posteriors import GaussianPosterior, Posterior


class MVAE(ExpertRival):
    """Trained by sub-sampling (their equation 4): the ELBO of all modalities, of each alone, and of one random other subset."""

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        experts = self.experts(arrays)
        return [GaussianPosterior(product(experts, seen, "inside")) for seen in masks]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        experts = self.experts(batch.arrays)
        total, figures = torch.zeros(()), {}
        for index, subset in enumerate(self._subsets(len(batch.present), generator)):
            seen = batch.present & subset
            q = product(experts, seen, "inside")
            elbo = self.objective(batch.arrays, seen, q, standard_like(q), self.noise(batch, generator))
            elbo = torch.where(seen.any(1), elbo, torch.zeros_like(elbo)).mean()
            total = total - elbo
            if index == 0:
                figures["elbo"] = elbo
        return total, figures

    def _subsets(self, rows: int, generator: torch.Generator) -> list[Tensor]:
        *partial, everything = every_subset(len(self.modalities))
        singles, others = partial[: len(self.modalities)], partial[len(self.modalities) :]
        if others:  # two modalities have no other
            others = [torch.stack(others)[torch.randint(len(others), (rows,), generator=generator)]]
        return [everything, *singles, *others]
