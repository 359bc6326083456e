"""The amortised posterior q(z | x_S) of any subset S of modalities."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from model.modality import Modality
from model.vae.gaussian import Gaussian, bounded
from model.vae.networks import encoder, initialise
from model.vae.presence import of_present, recording
from model.vae.product import product

POSTERIOR_SCALE = 0.3  # begin near the prior, and not on it

Fusion = Literal["set", "product"]


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
        self.fusion = _head(len(modalities) * features, hidden, latent)
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

    def begin_as(self, joint: "SetEncoder") -> None:
        """Take all weights of ``joint``."""
        self.load_state_dict(joint.state_dict())


class ProductEncoder(nn.Module):
    """An expert for each modality; a subset has their product, the spare priors divided out: prod q_m / p^(|S| - 1).

    Aligned in the place of a ``SetEncoder``, with its arguments. An expert is a trunk and a head of its own, so that what one
    modality says does not depend on which others are there.
    """

    def __init__(self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.names = [m.name for m in modalities]
        self.trunks = nn.ModuleDict({m.name: encoder(m, features, width) for m in modalities})
        self.heads = nn.ModuleDict({m.name: _head(features, hidden, latent) for m in modalities})
        for trunk, head in zip(self.trunks.values(), self.heads.values(), strict=True):
            initialise(trunk)
            initialise(head, last=POSTERIOR_SCALE)

    def features(
        self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"] | None = None
    ) -> Float[Tensor, "batch modality two_latent"]:
        """Mean and log variance of every expert; of absent modalities as ``SetEncoder.features``."""
        if present is None:
            return torch.stack([self._expert(name, arrays[name]) for name in self.names], dim=1)
        slots = zip(self.names, present.T, strict=True)
        return torch.stack([of_present(partial(self._expert, name), seen, arrays[name]) for name, seen in slots], dim=1)

    def fuse(self, features: Float[Tensor, "batch modality two_latent"], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """Posterior from the experts that ``present`` marks."""
        # What fills an absent slot may be no number, and none times nothing is none.
        chosen = torch.where(present.unsqueeze(-1), features, 0.0)
        return product(bounded(*chosen.transpose(0, 1).chunk(2, dim=-1)), present, "divided")

    def forward(self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """q(z | x_S), S being what ``present`` marks in each row."""
        return self.fuse(self.features(arrays, None if recording(present) else present), present)

    def begin_as(self, joint: SetEncoder) -> None:
        """Give from each single modality what ``joint`` gives from it alone."""
        self.trunks.load_state_dict(joint.trunks.state_dict())
        scale = len(self.names) ** 0.5  # of a lone modality, see ``SetEncoder.fuse``
        whole = joint.fusion[0]
        assert isinstance(whole, nn.Linear)
        slices = whole.weight.detach().view(-1, *joint.absent.shape)
        from_absent = scale * torch.einsum("hmf,mf->mh", slices, joint.absent.detach())
        for index, head in enumerate(self.heads.values()):
            state = dict(joint.fusion.state_dict())
            state["0.weight"] = scale * slices[:, index]
            state["0.bias"] = state["0.bias"] + from_absent.sum(0) - from_absent[index]
            head.load_state_dict(state)

    def _expert(self, name: str, x: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch two_latent"]:
        told: Tensor = self.heads[name](self.trunks[name](x))
        return told.float()


ENCODERS: dict[Fusion, type[SetEncoder] | type[ProductEncoder]] = {"set": SetEncoder, "product": ProductEncoder}


def _head(inputs: int, hidden: int, latent: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
    )
