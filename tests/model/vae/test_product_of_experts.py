"""Products of experts against products of densities on a grid, and against an exact posterior."""

import pytest
import torch
from torch.distributions import Normal

from concord.model.vae.gaussian import LOG_VAR_RANGE, Gaussian
from concord.model.vae.product_of_experts import Prior, product

EXPERTS = Gaussian(torch.tensor([[-1.0], [0.5], [2.0]]).unsqueeze(1), torch.tensor([[-1.0], [0.3], [-2.5]]).unsqueeze(1))
PRIOR_EXPONENT = {"inside": 1, "outside": 0, "divided": -1}  # in a product of two experts


def product_of(present: list[bool], prior: Prior) -> Gaussian:
    return product(EXPERTS, torch.tensor([present]), prior)


@pytest.mark.parametrize("prior", ["inside", "outside", "divided"])
def test_product_equals_product_of_densities(prior: Prior) -> None:
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log_density = PRIOR_EXPONENT[prior] * Normal(0.0, 1.0).log_prob(grid)
    for m in (0, 2):
        log_density = log_density + Normal(EXPERTS.mean[m, 0].double(), (EXPERTS.log_var[m, 0].double() / 2).exp()).log_prob(
            grid
        )
    density = torch.softmax(log_density, 0)
    mean = (density * grid).sum()
    variance = (density * (grid - mean).square()).sum()
    q = product_of([True, False, True], prior)
    torch.testing.assert_close(q.mean[0, 0].double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.log_var[0, 0].double().exp(), variance, rtol=1e-4, atol=1e-4)


def test_product_divided_of_exact_experts_is_the_exact_posterior() -> None:
    """x_m = z + noise. Each p(z | x_m) contains the prior once, so the plain product contains it three times."""
    noise = torch.tensor([0.5, 1.0, 2.0])
    x = torch.tensor([1.0, -0.3, 2.0])
    precision = 1 / noise
    experts = Gaussian((precision * x / (1 + precision)).view(3, 1, 1), -torch.log1p(precision).view(3, 1, 1))
    q = product(experts, torch.ones(1, 3, dtype=torch.bool), "divided")
    total = 1 + precision.sum()
    torch.testing.assert_close(q.log_var.exp(), (1 / total).view(1, 1))
    torch.testing.assert_close(q.mean, ((precision * x).sum() / total).view(1, 1))


def test_product_divided_of_wide_experts_has_the_precision_of_the_prior() -> None:
    wide = Gaussian(torch.zeros(3, 1, 1), torch.full((3, 1, 1), 3.0))
    assert product(wide, torch.ones(1, 3, dtype=torch.bool), "divided").log_var.item() == 0


@pytest.mark.parametrize("prior", ["outside", "divided"])
def test_product_of_one_expert_is_the_expert(prior: Prior) -> None:
    q = product_of([False, True, False], prior)
    torch.testing.assert_close(q.mean, EXPERTS.mean[1])
    torch.testing.assert_close(q.log_var, EXPERTS.log_var[1])


@pytest.mark.parametrize("prior", ["inside", "outside", "divided"])
def test_product_of_no_experts_is_the_prior_with_finite_gradients(prior: Prior) -> None:
    extreme = Gaussian(*(torch.tensor([[3.0], [-3.0]]).unsqueeze(1).requires_grad_() for _ in range(2)))
    q = product(extreme, torch.zeros(1, 2, dtype=torch.bool), prior)
    assert q.mean.item() == 0
    assert q.log_var.item() == 0
    (q.mean + q.log_var).sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in extreme if tensor.grad is not None)


def test_product_absent_expert_has_no_effect() -> None:
    experts = Gaussian(EXPERTS.mean.clone(), EXPERTS.log_var.clone())
    experts.mean[1], experts.log_var[1] = 1e6, LOG_VAR_RANGE[0]
    q = product(experts, torch.tensor([[True, False, True]]), "inside")
    torch.testing.assert_close(q.mean, product_of([True, False, True], "inside").mean)
