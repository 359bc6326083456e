"""A normalising flow that turns samples of a Gaussian posterior into samples of a non-Gaussian one.

The posterior given a subset of modalities is not Gaussian in general. Source: Rezende & Mohamed 2015.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from concord.model.vae.gaussian import Gaussian
from concord.model.vae.networks import initialise

MAX_LOG_SCALE = 2.0  # bound of |log scale| in one coupling


class Coupling(nn.Module):
    """Affine coupling: one half of z scales and shifts the other half, given a context. It starts as the identity.

    Args:
        latent: size of z.
        features: size of the context.
        hidden: size of the hidden layer.
        flip: keep the last half of z instead of the first.

    Source: Dinh et al. 2017, section 3.2.
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
        """Noise -> z.

        Args:
            z: (..., latent).
            context: (..., features), must broadcast against z.

        Returns:
            the transformed values (..., latent) and log |det| of the Jacobian (...,).
        """
        kept, moved = self._split(z)
        log_scale, shift = self._scale_and_shift(kept, context)
        return self._join(kept, moved * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z -> noise, and log |det| of the Jacobian of this direction. Shapes as ``forward``."""
        kept, moved = self._split(z)
        log_scale, shift = self._scale_and_shift(kept, context)
        return self._join(kept, (moved - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def _scale_and_shift(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        # The context belongs to a row, not to a sample. Projecting it separately does that once per row, which saves time in
        # chains of thousands of steps.
        hidden = nn.functional.silu(self.inner(kept) + self.given(context))
        log_scale, shift = self.outer(hidden).chunk(2, dim=-1)
        return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE), shift

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.flip:
            return z[..., -self.kept :], z[..., : -self.kept]
        return z[..., : self.kept], z[..., self.kept :]

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, kept) if self.flip else (kept, moved), dim=-1)


class Flow(nn.Module):
    """Flow of standard normal noise, conditioned on the Gaussian posterior: z = mean + sigma * f(noise; mean, log variance).

    f is a chain of affine couplings (Dinh et al. 2017). It starts as the identity, so z starts as a sample of the Gaussian. The
    posterior is the only condition, so one flow works for all subsets of modalities, refined or not.

    Args:
        latent: size of z.
        hidden: size of the hidden layers of the context network and of each coupling.
        couplings: number of couplings. Consecutive couplings transform different halves.
    """

    def __init__(self, *, latent: int, hidden: int, couplings: int) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.Linear(2 * latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        initialise(self.context)
        self.couplings = nn.ModuleList(Coupling(latent, hidden, hidden, flip=bool(i % 2)) for i in range(couplings))

    def forward(self, posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
        """z from standard normal noise."""
        context = self._context(posterior)
        for coupling in self._couplings():
            noise, _ = coupling.forward(noise, context)
        return posterior.mean.unsqueeze(1) + (0.5 * posterior.log_var).exp().unsqueeze(1) * noise

    def inverse(
        self, posterior: Gaussian, z: Float[Tensor, "batch sample latent"]
    ) -> tuple[Float[Tensor, "batch sample latent"], Float[Tensor, "batch sample"]]:
        """The noise that gives z, and log |det| of the Jacobian of z -> noise."""
        context = self._context(posterior)
        noise = (z - posterior.mean.unsqueeze(1)) * (-0.5 * posterior.log_var).exp().unsqueeze(1)
        log_determinants = -0.5 * posterior.log_var.sum(-1, keepdim=True).expand(z.shape[:2])
        for coupling in reversed(self._couplings()):
            noise, log_determinant = coupling.inverse(noise, context)
            log_determinants = log_determinants + log_determinant
        return noise, log_determinants

    def _context(self, posterior: Gaussian) -> Float[Tensor, "batch 1 hidden"]:
        context: Tensor = self.context(torch.cat((posterior.mean, posterior.log_var), dim=-1))
        return context.unsqueeze(1)

    def _couplings(self) -> list[Coupling]:
        return [coupling for coupling in self.couplings if isinstance(coupling, Coupling)]
