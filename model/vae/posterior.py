"""Encoders of the amortised posterior q(z | x_S) for any subset S of modalities."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from concord.model.modality import Modality
from concord.model.vae.gaussian import Gaussian, bounded
from concord.model.vae.masked import is_tracing, run_present
from concord.model.vae.networks import ModalityModules, NetworkSizes, encoder, initialise
from concord.model.vae.product_of_experts import product

POSTERIOR_SCALE = 0.3  # standard deviation of the initial output: posteriors start near the prior, but not equal to it

Fusion = Literal["set", "product"]


class SetEncoder(nn.Module):
    """One network for all subsets: a trunk per modality, then one fusion network for the features of all modalities.

    The features of an absent modality are replaced by a learned vector, by selection and not by multiplication, so that filler
    (possibly NaN) has no effect. The model has two: the joint encoder sees all modalities of a training row; the
    aligned encoder learns to predict the refined joint posterior from any subset of them.
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes) -> None:
        super().__init__()
        self.names = [m.name for m in modalities]
        self.trunks = ModalityModules({m.name: encoder(m, sizes) for m in modalities})
        self.absent = nn.Parameter(torch.zeros(len(modalities), sizes.features))
        self.fusion = _head(len(modalities) * sizes.features, sizes)
        for trunk in self.trunks.values():
            initialise(trunk)
        initialise(self.fusion, last=POSTERIOR_SCALE)

    def features(
        self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"] | None = None
    ) -> Float[Tensor, "batch modality feature"]:
        """Trunk features of every modality.

        Args:
            arrays: (batch, *shape) by modality.
            present: trunks run only on the rows that have their modality; other rows get zeros. None: trunks run on all rows,
                and the features of absent modalities are meaningless.
        """
        if present is None:
            return torch.stack([self.trunks[name](arrays[name]) for name in self.names], dim=1)
        columns = zip(self.names, present.T, strict=True)
        return torch.stack([run_present(self.trunks[name], column, arrays[name]) for name, column in columns], dim=1)

    def fuse(self, features: Float[Tensor, "batch modality feature"], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """Posterior from the features of the modalities in ``present``; all other features are ignored."""
        # Scale the features of few modalities to the norm of many. Without this, single modalities learn much more slowly.
        count = present.sum(1).clamp(min=1).to(features.dtype)
        scale = (present.shape[1] / count).sqrt().view(-1, 1, 1)
        selected = torch.where(present.unsqueeze(-1), features, self.absent) * scale
        mean, log_var = self.fusion(selected.flatten(1)).float().chunk(2, dim=-1)
        return bounded(mean, log_var)

    def fuse_each(
        self, features: Float[Tensor, "batch modality feature"], masks: Bool[Tensor, "subset batch modality"]
    ) -> list[Gaussian]:
        """Return the posterior of every mask, as ``fuse`` does for one of them, within rounding.

        The first layer is linear in the features of each modality. So its product with a modality's features, and with the
        vector that replaces them, is computed once for all masks.
        """
        first = self.fusion[0]
        assert isinstance(first, nn.Linear)
        weights = first.weight.view(-1, *self.absent.shape).permute(1, 2, 0)  # (modality, feature, hidden)
        known = torch.where(masks.any(0).unsqueeze(-1), features, 0.0)  # 0 * NaN is NaN
        of_features = torch.bmm(known.transpose(0, 1), weights).float()
        of_absent = torch.bmm(self.absent.unsqueeze(1), weights).float()
        counts = masks.sum(2).clamp(min=1).to(torch.float32)
        scales = (masks.shape[2] / counts).sqrt().transpose(0, 1).unsqueeze(-1)  # as in ``fuse``
        with torch.autocast(features.device.type, enabled=False):  # a second rounding to bfloat16 would add to the first
            chosen = torch.bmm(masks.permute(1, 0, 2).to(torch.float32), (of_features - of_absent).transpose(0, 1))
            hidden = (chosen + of_absent.sum(0)) * scales + first.bias
        outputs = self.fusion[1:](hidden.transpose(0, 1)).float()
        return [bounded(*output.chunk(2, dim=-1)) for output in outputs]

    def forward(self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """q(z | x_S) of each row, where S is the row's set of modalities in ``present``."""
        return self.fuse(self.features(arrays, None if is_tracing(present) else present), present)

    def initialise_from(self, joint: "SetEncoder") -> None:
        """Copy all weights of ``joint``."""
        self.load_state_dict(joint.state_dict())


class ProductEncoder(nn.Module):
    """One expert per modality. The posterior of a subset is prod_m q_m / p^(|S| - 1), see ``product`` with prior ``divided``.

    An alternative to ``SetEncoder`` as the aligned encoder, with the same arguments. Each expert has its own trunk and head, so
    the contribution of a modality does not depend on which others are present.
    """

    def __init__(self, modalities: Sequence[Modality], sizes: NetworkSizes) -> None:
        super().__init__()
        self.names = [m.name for m in modalities]
        self.trunks = ModalityModules({m.name: encoder(m, sizes) for m in modalities})
        self.heads = ModalityModules({m.name: _head(sizes.features, sizes) for m in modalities})
        for trunk, head in zip(self.trunks.values(), self.heads.values(), strict=True):
            initialise(trunk)
            initialise(head, last=POSTERIOR_SCALE)

    def features(
        self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"] | None = None
    ) -> Float[Tensor, "batch modality two_latent"]:
        """Mean and log variance of every expert, concatenated. For absent modalities as ``SetEncoder.features``."""
        if present is None:
            return torch.stack([self._expert(name, arrays[name]) for name in self.names], dim=1)
        columns = zip(self.names, present.T, strict=True)
        return torch.stack([run_present(partial(self._expert, name), column, arrays[name]) for name, column in columns], dim=1)

    def fuse(self, features: Float[Tensor, "batch modality two_latent"], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """Posterior from the experts of the modalities in ``present``; all other features are ignored."""
        # Filler may be NaN, and NaN * 0 is NaN: select, do not multiply.
        selected = torch.where(present.unsqueeze(-1), features, 0.0)
        return product(bounded(*selected.transpose(0, 1).chunk(2, dim=-1)), present, "divided")

    def fuse_each(
        self, features: Float[Tensor, "batch modality two_latent"], masks: Bool[Tensor, "subset batch modality"]
    ) -> list[Gaussian]:
        """Return the posterior of every mask, as ``fuse`` does for one of them."""
        return [self.fuse(features, mask) for mask in masks]

    def forward(self, arrays: Mapping[str, Shaped[Tensor, "batch ..."]], present: Bool[Tensor, "batch modality"]) -> Gaussian:
        """q(z | x_S) of each row, where S is the row's set of modalities in ``present``."""
        return self.fuse(self.features(arrays, None if is_tracing(present) else present), present)

    def initialise_from(self, joint: SetEncoder) -> None:
        """Set the weights so that each expert gives the posterior that ``joint`` gives from this modality alone."""
        self.trunks.load_state_dict(joint.trunks.state_dict())
        scale = len(self.names) ** 0.5  # of a single modality, see ``SetEncoder.fuse``
        first = joint.fusion[0]
        assert isinstance(first, nn.Linear)
        slices = first.weight.detach().view(-1, *joint.absent.shape)  # (hidden, modality, feature)
        # An expert sees one modality, so the contributions of the other modalities' learned vectors go into its bias.
        from_absent = scale * torch.einsum("hmf,mf->mh", slices, joint.absent.detach())
        for index, head in enumerate(self.heads.values()):
            state = dict(joint.fusion.state_dict())
            state["0.weight"] = scale * slices[:, index]
            state["0.bias"] = state["0.bias"] + from_absent.sum(0) - from_absent[index]
            head.load_state_dict(state)

    def _expert(self, name: str, x: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch two_latent"]:
        expert: Tensor = self.heads[name](self.trunks[name](x))
        return expert.float()


ENCODERS: dict[Fusion, type[SetEncoder] | type[ProductEncoder]] = {"set": SetEncoder, "product": ProductEncoder}


def _head(inputs: int, sizes: NetworkSizes) -> nn.Sequential:
    latent, hidden = sizes.latent, sizes.hidden
    if sizes.shallow:
        return nn.Sequential(nn.Linear(inputs, 2 * latent))
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
    )
