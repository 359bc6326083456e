"""What a subset leaves open is no Gaussian: a flow that shapes the samples of a Gaussian posterior (Rezende & Mohamed 2015)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.vae.gaussian import Gaussian
from model.vae.networks import initialise

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


class Flow(nn.Module):
    """Affine couplings (Dinh et al. 2017) of standard normal noise, given the posterior that is sampled: z = mean + standard
    deviation * f(noise; mean, log variance). Begins as the Gaussian itself.

    The posterior is all that it is given, so that one flow serves every subset, refined or not.

    Args:
        hidden: of the network that reads the posterior, and of each coupling.
        couplings: how many; neighbours move different halves.
    """

    def __init__(self, *, latent: int, hidden: int, couplings: int) -> None:
        super().__init__()
        self.context = nn.Sequential(nn.Linear(2 * latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        initialise(self.context)
        self.couplings = nn.ModuleList(Coupling(latent, hidden, hidden, flip=bool(i % 2)) for i in range(couplings))

    def forward(self, posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
        """z of standard normal noise."""
        context = self._context(posterior)
        for coupling in self._couplings():
            noise, _ = coupling.forward(noise, context)
        return posterior.mean.unsqueeze(1) + (0.5 * posterior.log_var).exp().unsqueeze(1) * noise

    def inverse(
        self, posterior: Gaussian, z: Float[Tensor, "batch sample latent"]
    ) -> tuple[Float[Tensor, "batch sample latent"], Float[Tensor, "batch sample"]]:
        """The noise that gives z, and log |det| of the Jacobian of this direction."""
        context = self._context(posterior)
        noise = (z - posterior.mean.unsqueeze(1)) * (-0.5 * posterior.log_var).exp().unsqueeze(1)
        volume = -0.5 * posterior.log_var.sum(-1, keepdim=True).expand(z.shape[:2])
        for coupling in reversed(self._couplings()):
            noise, log_determinant = coupling.inverse(noise, context)
            volume = volume + log_determinant
        return noise, volume

    def _context(self, posterior: Gaussian) -> Float[Tensor, "batch 1 hidden"]:
        seen: Tensor = self.context(torch.cat((posterior.mean, posterior.log_var), dim=-1))
        return seen.unsqueeze(1)

    def _couplings(self) -> list[Coupling]:
        return [coupling for coupling in self.couplings if isinstance(coupling, Coupling)]
