"""Flow: it starts as the Gaussian, its inverse is exact, and its log determinant equals that of the Jacobian."""

import math

import pytest
import torch
from torch import Tensor

from concord.model.vae.flow import Flow
from concord.model.vae.gaussian import Gaussian, sample

ROWS, SAMPLES = 3, 4


def posterior_and_noise(latent: int) -> tuple[Gaussian, Tensor]:
    generator = torch.Generator().manual_seed(1)
    posterior = Gaussian(*(torch.randn(ROWS, latent, generator=generator, dtype=torch.float64) for _ in range(2)))
    return posterior, torch.randn(ROWS, SAMPLES, latent, generator=generator, dtype=torch.float64)


def make_flow(latent: int, *, trained: bool) -> Flow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(latent=latent, hidden=7, couplings=4).double()
        if trained:
            for parameter in flow.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
    return flow.requires_grad_(False)


def test_flow_untrained_equals_the_gaussian() -> None:
    posterior, noise = posterior_and_noise(5)
    flow = make_flow(5, trained=False)
    torch.testing.assert_close(flow(posterior, noise), sample(posterior, noise))
    inverted, log_determinant = flow.inverse(posterior, sample(posterior, noise))
    torch.testing.assert_close(inverted, noise)
    torch.testing.assert_close(log_determinant, -0.5 * posterior.log_var.sum(-1, keepdim=True).expand(ROWS, SAMPLES))


@pytest.mark.parametrize("latent", [2, 5])  # an odd size has halves of different sizes
def test_flow_inverse_gives_noise_and_log_determinant_of_jacobian(latent: int) -> None:
    posterior, noise = posterior_and_noise(latent)
    flow = make_flow(latent, trained=True)
    z = flow(posterior, noise)
    assert (z - sample(posterior, noise)).abs().max() > 0.1
    inverted, log_determinant = flow.inverse(posterior, z)
    torch.testing.assert_close(inverted, noise)
    for row in range(ROWS):
        q = Gaussian(posterior.mean[row : row + 1], posterior.log_var[row : row + 1])
        for s in range(SAMPLES):
            jacobian = torch.autograd.functional.jacobian(lambda e, q=q: flow(q, e.view(1, 1, -1))[0, 0], noise[row, s])
            torch.testing.assert_close(log_determinant[row, s], -torch.linalg.slogdet(jacobian).logabsdet)


def test_flow_sample_does_not_depend_on_other_rows_and_samples() -> None:
    posterior, noise = posterior_and_noise(5)
    flow = make_flow(5, trained=True)
    batch = flow(posterior, noise)
    for row in range(ROWS):
        q = Gaussian(posterior.mean[row : row + 1], posterior.log_var[row : row + 1])
        torch.testing.assert_close(flow(q, noise[row : row + 1, 1:2]), batch[row : row + 1, 1:2])


def test_flow_shape_depends_on_the_posterior() -> None:
    """A wider posterior gives other samples than the same samples scaled by its standard deviation."""
    posterior, noise = posterior_and_noise(5)
    flow = make_flow(5, trained=True)
    wider = Gaussian(posterior.mean, posterior.log_var + 0.5)
    scaled = posterior.mean.unsqueeze(1) + (flow(posterior, noise) - posterior.mean.unsqueeze(1)) * math.exp(0.25)
    assert not torch.allclose(flow(wider, noise), scaled)
