"""Conditional normalising flow q(z | x_m): affine couplings (Dinh et al. 2017) around a conditional Gaussian."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.vae.flow import Coupling
from model.vae.gaussian import Gaussian, bounded
from model.vae.networks import initialise
from training.posteriors import log_normal


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
