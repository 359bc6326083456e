"""A flow around a posterior: it begins as the Gaussian, can be inverted, and knows its own volume."""

import math

import pytest
import torch
from torch import Tensor

from model.vae.flow import Flow
from model.vae.gaussian import Gaussian, sample

ROWS, SAMPLES = 3, 4


def drawn(latent: int) -> tuple[Gaussian, Tensor]:
    generator = torch.Generator().manual_seed(1)
    posterior = Gaussian(*(torch.randn(ROWS, latent, generator=generator, dtype=torch.float64) for _ in range(2)))
    return posterior, torch.randn(ROWS, SAMPLES, latent, generator=generator, dtype=torch.float64)


def make(latent: int, *, trained: bool) -> Flow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(latent=latent, hidden=7, couplings=4).double()
        if trained:
            for parameter in flow.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
    return flow.requires_grad_(False)


def test_it_begins_as_the_gaussian() -> None:
    posterior, noise = drawn(5)
    flow = make(5, trained=False)
    torch.testing.assert_close(flow(posterior, noise), sample(posterior, noise))
    back, volume = flow.inverse(posterior, sample(posterior, noise))
    torch.testing.assert_close(back, noise)
    torch.testing.assert_close(volume, -0.5 * posterior.log_var.sum(-1, keepdim=True).expand(ROWS, SAMPLES))


@pytest.mark.parametrize("latent", [2, 5])  # an odd size splits unevenly
def test_the_inverse_inverts_and_its_volume_is_the_jacobian(latent: int) -> None:
    posterior, noise = drawn(latent)
    flow = make(latent, trained=True)
    z = flow(posterior, noise)
    assert (z - sample(posterior, noise)).abs().max() > 0.1
    back, volume = flow.inverse(posterior, z)
    torch.testing.assert_close(back, noise)
    for row in range(ROWS):
        own = Gaussian(posterior.mean[row : row + 1], posterior.log_var[row : row + 1])
        for s in range(SAMPLES):
            jacobian = torch.autograd.functional.jacobian(lambda e, own=own: flow(own, e.view(1, 1, -1))[0, 0], noise[row, s])
            torch.testing.assert_close(volume[row, s], -torch.linalg.slogdet(jacobian).logabsdet)


def test_samples_do_not_touch_each_other() -> None:
    posterior, noise = drawn(5)
    flow = make(5, trained=True)
    whole = flow(posterior, noise)
    for row in range(ROWS):
        own = Gaussian(posterior.mean[row : row + 1], posterior.log_var[row : row + 1])
        torch.testing.assert_close(flow(own, noise[row : row + 1, 1:2]), whole[row : row + 1, 1:2])
    moved = Gaussian(posterior.mean, posterior.log_var + 0.5)
    wider = posterior.mean.unsqueeze(1) + (whole - posterior.mean.unsqueeze(1)) * math.exp(0.25)
    assert not torch.allclose(flow(moved, noise), wider), "the shape depends on the posterior, not its place and scale alone"
