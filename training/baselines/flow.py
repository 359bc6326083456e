"""Conditional normalising flow q(z | x_m): affine couplings (Dinh et al. 2017) on a conditional Gaussian."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from concord.model.vae.flow import Coupling
from concord.model.vae.gaussian import Gaussian, bounded
from concord.model.vae.networks import initialise
from concord.training.posteriors import log_normal


class ConditionalFlow(nn.Module):
    """A Gaussian conditioned on a context vector, followed by couplings.

    Args:
        latent: size of z.
        features: size of the context.
        hidden: width of the hidden layers.
        couplings: number of couplings. Consecutive couplings transform opposite halves of z.
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
        """Return samples of z from standard normal noise."""
        base, condition = self._base(context), context.unsqueeze(1)
        z = base.mean + (0.5 * base.log_var).exp() * noise
        for coupling in self._couplings():
            z, _ = coupling.forward(z, condition)
        return z

    def log_density(
        self, z: Float[Tensor, "batch sample latent"], context: Float[Tensor, "batch feature"]
    ) -> Float[Tensor, "batch sample"]:
        """Return log q(z | context) in nats."""
        condition = context.unsqueeze(1)
        log_determinants = torch.zeros_like(z[..., 0])
        for coupling in reversed(self._couplings()):
            z, log_determinant = coupling.inverse(z, condition)
            log_determinants = log_determinants + log_determinant
        return log_determinants + log_normal(z, self._base(context))

    def _couplings(self) -> list[Coupling]:
        return [coupling for coupling in self.couplings if isinstance(coupling, Coupling)]

    def _base(self, context: Tensor) -> Gaussian:
        mean, log_var = self.base(context).unsqueeze(1).chunk(2, dim=-1)
        return bounded(mean, log_var)
