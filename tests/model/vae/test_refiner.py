"""Refiner: gradient code, size and direction of steps, no step without a gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concord.model.vae.gaussian import LOG_VAR_RANGE, Gaussian
from concord.model.vae.refiner import MAX_STEP, Refiner, gradient_code


def code(g: float, p: float = 10.0) -> tuple[float, float]:
    """The definition of Andrychowicz et al. 2016, appendix A."""
    if abs(g) >= math.exp(-p):
        return math.log(abs(g)) / p, math.copysign(1.0, g)
    return -1.0, math.exp(p) * g


@given(st.lists(st.floats(-1e20, 1e20), min_size=1, max_size=6))
def test_gradient_code_equals_its_definition(numbers: list[float]) -> None:
    actual = gradient_code(torch.tensor([numbers], dtype=torch.float64))[0]
    expected = torch.tensor([code(g) for g in numbers], dtype=torch.float64).T.flatten()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("g", [0.0, math.exp(-10), -math.exp(-10), 1e-30, 1.0, -1e20])
def test_gradient_code_at_the_threshold_and_extremes_equals_its_definition(g: float) -> None:
    size, direction = gradient_code(torch.tensor([[g]], dtype=torch.float64))[0].tolist()
    assert (size, direction) == pytest.approx(code(g), abs=1e-9)


@pytest.fixture
def refiner() -> Refiner:
    torch.manual_seed(0)
    refiner = Refiner(latent=4, hidden=16, beta=2.0)
    torch.nn.init.normal_(refiner.rates[-1].weight)
    return refiner.requires_grad_(False)


def random_gaussian(rows: int, scale: float = 1.0, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(scale * torch.randn(rows, 4, generator=generator) for _ in range(2)))


def test_refiner_zero_gradient_keeps_the_posterior(refiner: Refiner) -> None:
    posterior = random_gaussian(5)
    after = refiner(posterior, Gaussian(torch.zeros(5, 4), torch.zeros(5, 4)))
    assert torch.equal(after.mean, posterior.mean)
    assert torch.equal(after.log_var, posterior.log_var)


def test_refiner_row_does_not_depend_on_the_batch(refiner: Refiner) -> None:
    posterior, gradient = random_gaussian(9), random_gaussian(9, scale=10, seed=1)
    batch = refiner(posterior, gradient)
    for i in range(9):
        single = refiner(*(Gaussian(g.mean[i : i + 1], g.log_var[i : i + 1]) for g in (posterior, gradient)))
        torch.testing.assert_close(single.mean[0], batch.mean[i])
        torch.testing.assert_close(single.log_var[0], batch.log_var[i])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12, 1e30])
def test_refiner_steps_follow_the_gradient_and_are_limited(refiner: Refiner, scale: float) -> None:
    posterior, gradient = random_gaussian(50), random_gaussian(50, scale=scale, seed=1)
    after = refiner(posterior, gradient)
    mean_step = (after.mean - posterior.mean) / (0.5 * posterior.log_var).exp()
    log_var_step = after.log_var - posterior.log_var
    for step, direction in ((mean_step, gradient.mean), (log_var_step, gradient.log_var)):
        assert step.abs().max() <= MAX_STEP + 1e-5
        assert torch.all((step * direction.sign()) >= 0)
    assert (scale < 1) == bool(mean_step.abs().max() < 0.1)


def test_refiner_log_variance_stays_in_range(refiner: Refiner) -> None:
    low, high = LOG_VAR_RANGE
    posterior = Gaussian(torch.zeros(2, 4), torch.tensor([[low] * 4, [high] * 4]))
    after = refiner(posterior, Gaussian(torch.zeros(2, 4), torch.tensor([[-1e3] * 4, [1e3] * 4])))
    assert torch.equal(after.log_var, posterior.log_var)


def test_refiner_step_size_one_is_a_newton_step_on_the_kl() -> None:
    """With a constant likelihood the objective is -beta KL(q || N(0, I)), and a natural gradient step moves the mean to 0."""
    beta = 3.0
    refiner = Refiner(latent=1, hidden=4, beta=beta).requires_grad_(False)
    torch.nn.init.constant_(refiner.rates[-1].bias, math.log(2.0))  # 1.5 sigmoid(log 2) = 1
    mean, log_var = torch.tensor([[0.02]]), torch.zeros(1, 1)
    after = refiner(Gaussian(mean, log_var), Gaussian(-beta * mean, torch.zeros(1, 1)))
    assert after.mean.item() == pytest.approx(0, abs=1e-5)


def test_refiner_untrained_takes_small_steps() -> None:
    posterior, gradient = random_gaussian(20), random_gaussian(20, scale=0.1, seed=1)
    after = Refiner(latent=4, hidden=16, beta=1.0)(posterior, gradient)
    assert (after.mean - posterior.mean).abs().max() < 0.2
