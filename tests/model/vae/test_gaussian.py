"""Diagonal Gaussians against torch.distributions and against statistics of samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from concord.model.vae.gaussian import LOG_VAR_RANGE, Gaussian, antithetic, bounded, kl, sample, standard_like


def random_gaussian(*shape: int, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))


def distribution(q: Gaussian) -> Independent:
    return Independent(Normal(q.mean, (0.5 * q.log_var).exp()), 1)


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 2), (1, 1)])
def test_kl_equals_torch_distributions(shape: tuple[int, ...]) -> None:
    q, p = random_gaussian(*shape, seed=1), random_gaussian(*shape, seed=2)
    torch.testing.assert_close(kl(q, p), kl_divergence(distribution(q), distribution(p)))


def test_kl_equals_mean_log_ratio_of_samples() -> None:
    q, p = random_gaussian(3, 2, seed=1), random_gaussian(3, 2, seed=2)
    z = sample(q, torch.randn(3, 200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    ratios = distribution(q).log_prob(z.transpose(0, 1)) - distribution(p).log_prob(z.transpose(0, 1))
    error = ratios.std(0) / 200_000**0.5
    assert torch.all((ratios.mean(0) - kl(q, p)).abs() < 5 * error)


@given(st.lists(st.tuples(*[st.floats(-50, 50), st.floats(*LOG_VAR_RANGE)] * 2), min_size=1, max_size=4))
def test_kl_to_itself_is_zero_and_to_others_not_negative(numbers: list[tuple[float, ...]]) -> None:
    q_mean, q_log_var, p_mean, p_log_var = torch.tensor(numbers, dtype=torch.float64).T.unsqueeze(1)
    q, p = Gaussian(q_mean, q_log_var), Gaussian(p_mean, p_log_var)
    assert kl(q, q) == 0
    assert kl(q, p) >= -1e-12


def test_sample_has_mean_and_standard_deviation() -> None:
    q = random_gaussian(2, 3)
    z = sample(q, torch.randn(2, 100_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    deviation = (0.5 * q.log_var).exp()
    assert torch.all((z.mean(1) - q.mean).abs() < 5 * deviation / 100_000**0.5)
    torch.testing.assert_close(z.std(1), deviation, rtol=0.02, atol=0)


def test_sample_scales_and_shifts_the_noise() -> None:
    q = Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2.0]]).log() * 2)
    z = sample(q, torch.tensor([[[3.0, 5.0], [0.0, -1.0]]]))
    torch.testing.assert_close(z, torch.tensor([[[1.0, 8.0], [1.0, -4.0]]]))


def test_antithetic_pairs_each_sample_with_its_negative() -> None:
    noise = torch.randn(3, 2, 4)
    pairs = antithetic(noise)
    assert pairs.shape == (3, 4, 4)
    assert torch.equal(pairs[:, 0::2], noise)
    assert torch.equal(pairs[:, 1::2], -noise)


def test_bounded_clamps_the_log_variance() -> None:
    low, high = LOG_VAR_RANGE
    q = bounded(torch.zeros(1, 3), torch.tensor([[-100.0, 1.0, 100.0]]))
    assert q.log_var.tolist() == [[low, 1.0, high]]


def test_standard_like_is_standard_normal_of_the_same_shape() -> None:
    q = random_gaussian(5, 2)
    prior = standard_like(q)
    z = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(distribution(prior).log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_detach_is_equal_and_has_no_gradient() -> None:
    q = Gaussian(torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True))
    assert not any(tensor.requires_grad for tensor in q.detach())
    assert q.detach() == q
