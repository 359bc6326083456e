"""Products of experts against products of densities on a grid, and against the posterior that they should equal."""

import pytest
import torch
from torch.distributions import Normal

from model.vae.gaussian import LOG_VAR_RANGE, Gaussian
from model.vae.product import Prior, product

EXPERTS = Gaussian(torch.tensor([[-1.0], [0.5], [2.0]]).unsqueeze(1), torch.tensor([[-1.0], [0.3], [-2.5]]).unsqueeze(1))
POWER = {"inside": 1, "outside": 0, "divided": -1}  # of the prior, for two experts


def several(present: list[bool], prior: Prior) -> Gaussian:
    return product(EXPERTS, torch.tensor([present]), prior)


@pytest.mark.parametrize("prior", ["inside", "outside", "divided"])
def test_a_product_of_densities(prior: Prior) -> None:
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    log = POWER[prior] * Normal(0.0, 1.0).log_prob(grid)
    for m in (0, 2):
        log = log + Normal(EXPERTS.mean[m, 0].double(), (EXPERTS.log_var[m, 0].double() / 2).exp()).log_prob(grid)
    density = torch.softmax(log, 0)
    mean = (density * grid).sum()
    variance = (density * (grid - mean).square()).sum()
    found = several([True, False, True], prior)
    torch.testing.assert_close(found.mean[0, 0].double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_var[0, 0].double().exp(), variance, rtol=1e-4, atol=1e-4)


def test_exact_experts_divided_give_the_exact_posterior() -> None:
    """x_m = z + noise: each p(z | x_m) holds the prior once, their product would hold it three times."""
    noise = torch.tensor([0.5, 1.0, 2.0])
    x = torch.tensor([1.0, -0.3, 2.0])
    precision = 1 / noise
    experts = Gaussian((precision * x / (1 + precision)).view(3, 1, 1), -torch.log1p(precision).view(3, 1, 1))
    found = product(experts, torch.ones(1, 3, dtype=torch.bool), "divided")
    total = 1 + precision.sum()
    torch.testing.assert_close(found.log_var.exp(), (1 / total).view(1, 1))
    torch.testing.assert_close(found.mean, ((precision * x).sum() / total).view(1, 1))


def test_experts_wider_than_the_prior_leave_its_precision() -> None:
    wide = Gaussian(torch.zeros(3, 1, 1), torch.full((3, 1, 1), 3.0))
    assert product(wide, torch.ones(1, 3, dtype=torch.bool), "divided").log_var.item() == 0


@pytest.mark.parametrize("prior", ["outside", "divided"])
def test_one_expert_stands_for_itself(prior: Prior) -> None:
    found = several([False, True, False], prior)
    torch.testing.assert_close(found.mean, EXPERTS.mean[1])
    torch.testing.assert_close(found.log_var, EXPERTS.log_var[1])


@pytest.mark.parametrize("prior", ["inside", "outside", "divided"])
def test_nothing_present_is_the_prior_and_slopes_stay_numbers(prior: Prior) -> None:
    extreme = Gaussian(*(torch.tensor([[3.0], [-3.0]]).unsqueeze(1).requires_grad_() for _ in range(2)))
    found = product(extreme, torch.zeros(1, 2, dtype=torch.bool), prior)
    assert found.mean.item() == 0
    assert found.log_var.item() == 0
    (found.mean + found.log_var).sum().backward()
    assert all(bool(part.grad.isfinite().all()) for part in extreme if part.grad is not None)


def test_absent_experts_do_not_count() -> None:
    loud = Gaussian(EXPERTS.mean.clone(), EXPERTS.log_var.clone())
    loud.mean[1], loud.log_var[1] = 1e6, LOG_VAR_RANGE[0]
    found = product(loud, torch.tensor([[True, False, True]]), "inside")
    torch.testing.assert_close(found.mean, several([True, False, True], "inside").mean)
