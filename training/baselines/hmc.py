"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) for densities that are known up to a constant factor."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LEAPFROG_STEPS = 5
INCREASE, DECREASE = 1.1, 0.8
"""Factors of the step size after an accepted and after a rejected proposal. They balance at 70 % accepted."""


def hamiltonian(
    log_density: Callable[[Tensor], Tensor],
    z: Float[Tensor, "batch sample latent"],
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float = 0.1,
) -> Float[Tensor, "batch sample latent"]:
    """Return the state of independent chains, one for each sample.

    Args:
        log_density: unnormalised, (batch, sample, latent) -> (batch, sample).
        z: initial states.
        generator: of momenta and acceptance.
        steps: number of proposals.
        step_size: initial leapfrog step size. Each chain adapts its step size in the first half of its proposals.
    """
    size = torch.full_like(z[..., :1], step_size)
    value, gradient = _value_and_gradient(log_density, z)
    for step in range(steps):
        initial_momentum = torch.randn(z.shape, generator=generator).to(z.device)
        proposal, momentum, new_gradient = z, initial_momentum + size / 2 * gradient, gradient
        for leap in range(LEAPFROG_STEPS):
            proposal = proposal + size * momentum
            new_value, new_gradient = _value_and_gradient(log_density, proposal)
            momentum = momentum + (size if leap < LEAPFROG_STEPS - 1 else size / 2) * new_gradient
        change = new_value - value + 0.5 * (initial_momentum.square() - momentum.square()).sum(-1)
        accepted = (
            torch.rand(change.shape, generator=generator).to(z.device).log() < change
        )  # False for NaN, of a path that diverged
        z, gradient = (torch.where(accepted.unsqueeze(-1), new, old) for new, old in ((proposal, z), (new_gradient, gradient)))
        value = torch.where(accepted, new_value, value)
        if step < steps // 2:
            size = size * torch.where(accepted, INCREASE, DECREASE).unsqueeze(-1)
    return z


def _value_and_gradient(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
