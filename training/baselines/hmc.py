"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) for densities that can be evaluated and not sampled."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LEAPFROGS = 5
RISE, FALL = 1.1, 0.8  # of the step size after an accepted and a refused move: in balance at 70 % accepted


def hamiltonian(
    log_density: Callable[[Tensor], Tensor],
    z: Float[Tensor, "batch sample latent"],
    generator: torch.Generator,
    *,
    steps: int,
    step_size: float = 0.1,
) -> Float[Tensor, "batch sample latent"]:
    """One independent chain for every sample; its state after ``steps`` moves.

    Args:
        log_density: unnormalised, (batch, sample, latent) -> (batch, sample).
        z: where the chains start.
        step_size: at the start; every chain adapts its own in the first half of its moves.
    """
    size = torch.full((*z.shape[:2], 1), step_size)
    value, slope = _slope(log_density, z)
    for step in range(steps):
        momentum = torch.randn(z.shape, generator=generator)
        moved, ahead, onward = z, momentum + size / 2 * slope, slope
        for leap in range(LEAPFROGS):
            moved = moved + size * ahead
            there, onward = _slope(log_density, moved)
            ahead = ahead + (size if leap < LEAPFROGS - 1 else size / 2) * onward
        change = there - value + 0.5 * (momentum.square() - ahead.square()).sum(-1)
        accepted = torch.rand(change.shape, generator=generator).log() < change  # false where a diverged path gives NaN
        z, slope = (torch.where(accepted.unsqueeze(-1), new, old) for new, old in ((moved, z), (onward, slope)))
        value = torch.where(accepted, there, value)
        if step < steps // 2:
            size = size * torch.where(accepted, RISE, FALL).unsqueeze(-1)
    return z


def _slope(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = log_density(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope
