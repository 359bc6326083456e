"""Conditional flows: invertible, with the density of the change of variables."""

import pytest
import torch
from torch.distributions import Independent, Normal

from concord.training.baselines.flow import ConditionalFlow

FEATURES, ROWS, SAMPLES = 3, 4, 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[2, 5])
def flow(request: pytest.FixtureRequest) -> ConditionalFlow:
    """A flow with random weights, because couplings are initialised as the identity. The odd latent size splits unevenly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = ConditionalFlow(latent=request.param, features=FEATURES, hidden=7, couplings=4)
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return flow.double().requires_grad_(False)


def noise_and_context(flow: ConditionalFlow) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(ROWS, SAMPLES, flow.latent, generator=seeded(1), dtype=torch.float64)
    return noise, torch.randn(ROWS, FEATURES, generator=seeded(2), dtype=torch.float64)


def test_coupling_inverse_undoes_the_coupling(flow: ConditionalFlow) -> None:
    noise, context = noise_and_context(flow)
    condition = context.unsqueeze(1).expand(-1, SAMPLES, -1)
    for coupling in flow.couplings:
        z, log_determinant = coupling(noise, condition)
        inverse, inverse_log_determinant = coupling.inverse(z, condition)
        torch.testing.assert_close(inverse, noise)
        torch.testing.assert_close(log_determinant, -inverse_log_determinant)
        assert (z - noise).abs().max() > 0.1


def test_log_density_matches_the_jacobian(flow: ConditionalFlow) -> None:
    noise, context = noise_and_context(flow)
    z = flow.sample(noise, context)
    density = flow.log_density(z, context)
    for row in range(ROWS):
        for s in range(SAMPLES):
            jacobian = torch.autograd.functional.jacobian(
                lambda e, row=row: flow.sample(e.view(1, 1, -1), context[row : row + 1])[0, 0], noise[row, s]
            )
            expected = Independent(Normal(torch.zeros(flow.latent).double(), 1.0), 1).log_prob(noise[row, s])
            torch.testing.assert_close(density[row, s], expected - torch.linalg.slogdet(jacobian).logabsdet)


def test_untrained_flow_is_its_base_gaussian() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = ConditionalFlow(latent=4, features=FEATURES, hidden=7, couplings=3)
    noise, context = torch.randn(ROWS, SAMPLES, 4, generator=seeded(1)), torch.randn(ROWS, FEATURES, generator=seeded(2))
    mean, log_var = flow.base(context).unsqueeze(1).chunk(2, dim=-1)
    torch.testing.assert_close(flow.sample(noise, context), mean + (log_var / 2).exp() * noise)


def test_flow_learns_a_bimodal_density() -> None:
    """Two modes without mass between them, which no Gaussian can represent."""
    torch.manual_seed(0)
    flow = ConditionalFlow(latent=2, features=1, hidden=32, couplings=4)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    context, generator = torch.zeros(1, 1), seeded()
    for _ in range(150):
        side = 4.0 * torch.randint(2, (1, 256, 1), generator=generator) - 2
        z = torch.cat((side, torch.zeros(1, 256, 1)), -1) + 0.3 * torch.randn(1, 256, 2, generator=generator)
        loss = -flow.log_density(z, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = flow.sample(torch.randn(1, 2000, 2, generator=seeded(3)), context)[0]
    assert (z[:, 0].abs() > 1).float().mean() > 0.85  # a Gaussian with these moments: 0.62
    assert 0.3 < (z[:, 0] > 0).float().mean() < 0.7
