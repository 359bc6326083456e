"""Posteriors of every kind: means, samples and densities agree with each other and with torch.distributions."""

from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from concord.model.vae.flow import Flow
from concord.model.vae.gaussian import Gaussian
from concord.training.concord import Concord
from concord.training.objectives import every_subset
from concord.training.posteriors import FlowPosterior, GaussianPosterior, MixturePosterior, Posterior, log_prior

ROWS, LATENT, MANY = 3, 2, 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussians(*shape: int) -> Gaussian:
    return Gaussian(torch.randn(*shape, generator=seeded(1)), torch.randn(*shape, generator=seeded(2)))


def mixture() -> MixturePosterior:
    """A mixture of up to 4 components: the rows have 4, 2 and 1 of them."""
    return MixturePosterior(gaussians(4, ROWS, LATENT), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool())


def distribution(q: Posterior, row: int) -> Any:
    if isinstance(q, MixturePosterior):
        active = q.active[:, row]
        mean, log_var = (part[active, row] for part in q.components)
        parts = Independent(Normal(mean, (log_var / 2).exp()), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros(len(mean))), parts)
    assert isinstance(q, GaussianPosterior)
    return Independent(Normal(q.mean[row], (q.gaussian.log_var[row] / 2).exp()), 1)


@pytest.fixture(params=["gaussian", "mixture"])
def posterior(request: Any) -> Posterior:
    return mixture() if request.param == "mixture" else GaussianPosterior(gaussians(ROWS, LATENT))


def test_log_density_matches_torch_distributions(posterior: Posterior) -> None:
    z = torch.randn(ROWS, 7, LATENT, generator=seeded(3))
    for row, density in enumerate(posterior.log_density(z)):
        torch.testing.assert_close(density, distribution(posterior, row).log_prob(z[row]))


def test_samples_have_the_mean_and_variance_of_the_posterior(posterior: Posterior) -> None:
    z = posterior.sample(MANY, seeded(4))
    assert z.shape == (ROWS, MANY, LATENT)
    for row in range(ROWS):
        expected = distribution(posterior, row)
        error = 5 * (expected.variance / MANY).sqrt()
        assert torch.all((z[row].mean(0) - expected.mean).abs() < error)
        assert torch.all((z[row].var(0) / expected.variance - 1).abs() < 0.1)
        torch.testing.assert_close(posterior.mean[row], expected.mean)


def test_samples_depend_on_the_seed_only(posterior: Posterior) -> None:
    assert torch.equal(posterior.sample(5, seeded(1)), posterior.sample(5, seeded(1)))
    assert not torch.equal(posterior.sample(5, seeded(1)), posterior.sample(5, seeded(2)))


def test_log_prior_is_standard_normal() -> None:
    z = torch.randn(5, 3, LATENT, generator=seeded())
    torch.testing.assert_close(log_prior(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_concord_posteriors_are_those_of_the_aligned_encoder(tiny_vae: Concord, make_rows: Any) -> None:
    arrays = make_rows(tiny_vae.modalities, ROWS)
    masks = [subset.expand(ROWS, 4) for subset in every_subset(4)]
    for mask, q in zip(masks, tiny_vae.posteriors(arrays, masks), strict=True):
        torch.testing.assert_close(q.mean, tiny_vae.aligned(arrays, mask).mean)


def test_mixture_without_components_is_the_prior() -> None:
    q = MixturePosterior(gaussians(4, ROWS, LATENT), torch.zeros(4, ROWS).bool())
    z = torch.randn(ROWS, 7, LATENT, generator=seeded(3))
    torch.testing.assert_close(q.log_density(z), log_prior(z))
    assert torch.equal(q.mean, torch.zeros(ROWS, LATENT))


@pytest.mark.parametrize("spread", [1.0, 0.7])
def test_flow_density_is_that_of_its_samples(spread: float) -> None:
    """E_q[p / q] is 1 for any density p inside q's support."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(latent=LATENT, hidden=7, couplings=4).requires_grad_(False)
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    gaussian = gaussians(ROWS, LATENT)
    q = FlowPosterior(gaussian, flow, spread)
    z = q.sample(MANY, seeded(4))
    assert z.shape == (ROWS, MANY, LATENT)
    narrow = GaussianPosterior(Gaussian(z.mean(1), (z.var(1) / 2).log()))
    ratio = (narrow.log_density(z) - q.log_density(z)).exp()
    error = 5 * ratio.std(1) / MANY**0.5
    assert torch.all((ratio.mean(1) - 1).abs() < error)
    assert error.max() < 0.1
    assert torch.equal(q.mean, gaussian.mean), "the embedding is the mean of the Gaussian"


def test_concord_samples_pass_through_its_flow(tiny_vae: Concord, make_vae: Any, make_rows: Any) -> None:
    with_flow = make_vae(tiny_vae.modalities, couplings=2, spread=0.5)
    arrays, present = make_rows(tiny_vae.modalities, ROWS), torch.ones(ROWS, 4, dtype=torch.bool)
    (plain,), (transformed,) = (model.posteriors(arrays, [present]) for model in (tiny_vae, with_flow))
    torch.testing.assert_close(transformed.mean, plain.mean)  # the flow is initialised last, so the other weights are equal
    assert not torch.allclose(transformed.sample(2, seeded()), plain.sample(2, seeded()))
    noise = torch.randn(ROWS, 2, tiny_vae.latent, generator=seeded())
    samples = with_flow.sample(transformed.gaussian, noise)
    torch.testing.assert_close(transformed.sample(2, seeded()), samples)
    torch.testing.assert_close(samples, with_flow.flow(transformed.gaussian, noise / 2))
