"""The amortised posterior q(z | x_S) of any subset S of modalities."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from model.modality import Modality
from model.vae.gaussian import Gaussian, bounded
from model.vae.networks import encoder, initialise
from model.vae.presence import of_present, recording

POSTERIOR_SCALE = 0.3  # begin near the prior, and not on it


class SetEncoder(nn.Module):
    """One network for every subset: a trunk for each modality, then one fusion of the features that are present.

    An absent modality's features are replaced (selected, not multiplied) by a learned vector, so that nothing of what fills
    its slot can pass. Used twice: as the joint encoder, which sees all that a training row has, and as the aligned encoder,
    which learns to give the refined joint posterior from any part of it.

    Args:
        features: size of each modality's feature vector.
        hidden: size of the fusion's two hidden layers.
        width: see ``networks.encoder``.
    """

    def __init__(self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.names = [m.name for m in modalities]
        self.trunks = nn.ModuleDict({m.name: encoder(m, features, width) for m in modalities})
        self.absent = nn.Parameter(torch.zeros(len(modalities), features))
        self.fusion = nn.Sequential(
            nn.Linear(len(modalities) * features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent),
        )
        for trunk in self.trunks.values():
            initialise(trunk)
        initialise(self.fusion, last=POSTERIOR_SCALE)

    def features(
        self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"] | None = None
    ) -> Float[Tensor, "batch modality feature"]:
        """Trunk features of every modality; those of absent ones mean nothing yet, and are not computed where ``present``
        says so."""
        if present is None:
            return torch.stack([self.trunks[name](arrays[name]) for name in self.names], dim=1)
        slots = zip(self.names, present.T, strict=True)
        return torch.stack([of_present(self.trunks[name], seen, arrays[name]) for name, seen in slots], dim=1)

    def fuse(self, features: Float[Tensor, "batch modality feature"], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """Posterior from the features that ``present`` marks."""
        # One vector in many slots must speak as loud as all would together, or single modalities learn several times slower.
        count = present.sum(1).clamp(min=1).to(features.dtype)
        scale = (present.shape[1] / count).sqrt().view(-1, 1, 1)
        chosen = torch.where(present.unsqueeze(-1), features, self.absent) * scale
        mean, log_var = self.fusion(chosen.flatten(1)).float().chunk(2, dim=-1)
        return bounded(mean, log_var)

    def forward(self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """q(z | x_S), S being what ``present`` marks in each row."""
        return self.fuse(self.features(arrays, None if recording(present) else present), present)
