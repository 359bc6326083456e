"""Conditional normalising flow q(z | x_m): affine couplings (Dinh et al. 2017) around a conditional Gaussian."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.vae.gaussian import Gaussian, bounded
from model.vae.networks import initialise
from training.posteriors import log_normal

MAX_LOG_SCALE = 2.0  # of one coupling


class Coupling(nn.Module):
    """One half of z scales and shifts the other, given the context. Begins as the identity.

    Args:
        flip: which half stays.
    """

    def __init__(self, latent: int, features: int, hidden: int, *, flip: bool) -> None:
        super().__init__()
        self.kept = latent // 2 if not flip else latent - latent // 2
        self.flip = flip
        self.given = nn.Linear(features, hidden)
        self.inner = nn.Linear(self.kept, hidden)
        self.outer = nn.Linear(hidden, 2 * (latent - self.kept))
        initialise(self, last=0.0)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Noise -> z: the moved values and log |det| of the Jacobian, (...,)."""
        kept, moved = self._parts(z)
        log_scale, shift = self._map(kept, context)
        return self._whole(kept, moved * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z -> noise, and log |det| of this direction."""
        kept, moved = self._parts(z)
        log_scale, shift = self._map(kept, context)
        return self._whole(kept, (moved - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def _map(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        # The context is a row's, not a sample's: projected once for all samples, which chains of thousands of steps need.
        hidden = nn.functional.silu(self.inner(kept) + self.given(context))
        log_scale, shift = self.outer(hidden).chunk(2, dim=-1)
        return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE), shift

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.flip:
            return z[..., -self.kept :], z[..., : -self.kept]
        return z[..., : self.kept], z[..., self.kept :]

    def _whole(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, kept) if self.flip else (kept, moved), dim=-1)


class ConditionalFlow(nn.Module):
    """A Gaussian of the context, then couplings.

    Args:
        features: size of the context.
        couplings: how many; neighbours move different halves.
    """

    def __init__(self, *, latent: int, features: int, hidden: int, couplings: int) -> None:
        super().__init__()
        self.latent = latent
        self.base = nn.Linear(features, 2 * latent)
        initialise(self.base, last=0.3)
        self.couplings = nn.ModuleList(Coupling(latent, features, hidden, flip=bool(i % 2)) for i in range(couplings))

    def sample(
        self, noise: Float[Tensor, "batch sample latent"], context: Float[Tensor, "batch feature"]
    ) -> Float[Tensor, "batch sample latent"]:
        """z of standard normal noise."""
        base, around = self._base(context), context.unsqueeze(1)
        z = base.mean + (0.5 * base.log_var).exp() * noise
        for coupling in self._couplings():
            z, _ = coupling.forward(z, around)
        return z

    def log_density(
        self, z: Float[Tensor, "batch sample latent"], context: Float[Tensor, "batch feature"]
    ) -> Float[Tensor, "batch sample"]:
        """log q(z | context), in nats."""
        around = context.unsqueeze(1)
        volume = torch.zeros(z.shape[:2])
        for coupling in reversed(self._couplings()):
            z, log_determinant = coupling.inverse(z, around)
            volume = volume + log_determinant
        return volume + log_normal(z, self._base(context))

    def _couplings(self) -> list[Coupling]:
        return [coupling for coupling in self.couplings if isinstance(coupling, Coupling)]

    def _base(self, context: Tensor) -> Gaussian:
        mean, log_var = self.base(context).unsqueeze(1).chunk(2, dim=-1)
        return bounded(mean, log_var)
