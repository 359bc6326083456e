"""MultimodalVAE: objective against a brute-force sum and a closed form; gradient against finite differences in float64."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Laplace, Normal

from concord.model.modality import VectorModality
from concord.model.vae.gaussian import Gaussian, antithetic, kl, standard_like
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.networks import NetworkSizes

ROWS, SAMPLES = 4, 6


def random_gaussian(rows: int, latent: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(0.5 * torch.randn(rows, latent, generator=generator) for _ in range(2)))


def brute_force(
    vae: MultimodalVAE, arrays: dict[str, Tensor], present: Tensor, q: Gaussian, anchor: Gaussian, noise: Tensor
) -> Tensor:
    """The objective in float64, with loops over rows, samples and modalities."""
    decoders = copy.deepcopy(vae.decoders).double()
    q, anchor, noise = Gaussian(*(t.double() for t in q)), Gaussian(*(t.double() for t in anchor)), noise.double()
    distributions: dict[str, Callable[[Tensor], Distribution]] = {
        "image": lambda raw: Laplace(raw.sigmoid(), 0.75),
        "text": lambda raw: Categorical(logits=raw),
        "vector": lambda raw: Normal(raw, 1.0),
        "binary": lambda raw: Bernoulli(logits=raw),
    }
    objectives = []
    for row in range(len(noise)):
        total = torch.zeros((), dtype=torch.float64)
        for eps in noise[row]:
            z = q.mean[row] + (q.log_var[row] / 2).exp() * eps
            for m, modality in enumerate(vae.modalities):
                if present[row, m]:
                    x = arrays[modality.name][row].double()
                    log_p = distributions[modality.kind](decoders[modality.name](z[None])[0]).log_prob(x).sum()
                    total = total + vae.weights[modality.name] * log_p / len(noise[row])
        divergence = kl(Gaussian(q.mean[row], q.log_var[row]), Gaussian(anchor.mean[row], anchor.log_var[row]))
        objectives.append(total - vae.beta * divergence)
    return torch.stack(objectives)


@pytest.fixture
def problem(tiny_vae: MultimodalVAE, make_rows) -> tuple[dict[str, Tensor], Tensor, Gaussian, Gaussian, Tensor]:
    """Arguments of the objective: complete and incomplete rows, with a different posterior and anchor for each row."""
    present = torch.tensor([[True] * 4, [True, False, False, True], [False, True, False, False], [True, False, True, True]])
    noise = antithetic(torch.randn(ROWS, SAMPLES // 2, tiny_vae.latent, generator=torch.Generator().manual_seed(3)))
    posteriors = [random_gaussian(ROWS, tiny_vae.latent, seed) for seed in (1, 2)]
    return make_rows(tiny_vae.modalities, ROWS), present, *posteriors, noise


def test_objective_equals_brute_force_sum(tiny_vae: MultimodalVAE, problem) -> None:
    torch.testing.assert_close(tiny_vae.objective(*problem).double(), brute_force(tiny_vae, *problem), rtol=1e-5, atol=1e-4)


def test_gradient_equals_finite_differences(tiny_vae: MultimodalVAE, problem) -> None:
    """Central differences of the brute-force sum. Rows are independent, so each coordinate is moved in all rows at once."""
    arrays, present, posterior, anchor, noise = problem
    gradient, objective = tiny_vae.gradient(*problem)
    torch.testing.assert_close(objective, tiny_vae.objective(*problem))
    step = 1e-6
    for part in range(2):
        for i in range(tiny_vae.latent):
            values = []
            for sign in (1, -1):
                moved = [t.double() for t in posterior]
                moved[part][:, i] += sign * step
                values.append(brute_force(tiny_vae, arrays, present, Gaussian(*moved), anchor, noise))
            expected = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient[part][:, i].double(), expected, rtol=1e-4, atol=1e-3)


def test_refine_step_applies_the_refiner_to_the_gradient(tiny_vae: MultimodalVAE, problem) -> None:
    gradient, objective = tiny_vae.gradient(*problem)
    after, objective_of_step = tiny_vae.refine_step(*problem)
    expected = tiny_vae.refiner(problem[2], gradient)
    assert torch.equal(after.mean, expected.mean)
    assert torch.equal(after.log_var, expected.log_var)
    assert torch.equal(objective, objective_of_step)


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_refine_step_filler_of_absent_modalities_has_no_effect(tiny_vae: MultimodalVAE, problem, filler: float) -> None:
    """Neither on the result nor on the gradient, where NaN * 0 would be NaN."""
    arrays, present, *rest = problem
    filled = {}
    for m, (name, x) in enumerate(arrays.items()):
        filled[name] = x.clone()
        filled[name][~present[:, m]] = 10**9 if x.dtype == torch.int64 else filler
    (expected, objective), (after, filled_objective) = (tiny_vae.refine_step(a, present, *rest) for a in (arrays, filled))
    assert torch.equal(after.mean, expected.mean)
    assert torch.equal(after.log_var, expected.log_var)
    assert torch.equal(filled_objective, objective)


def test_refine_step_row_does_not_depend_on_the_batch(tiny_vae: MultimodalVAE, problem) -> None:
    arrays, present, posterior, anchor, noise = problem
    batch, _ = tiny_vae.refine_step(*problem)
    for i in range(ROWS):
        row = slice(i, i + 1)
        single, _ = tiny_vae.refine_step(
            {name: x[row] for name, x in arrays.items()},
            present[row],
            Gaussian(*(t[row] for t in posterior)),
            Gaussian(*(t[row] for t in anchor)),
            noise[row],
        )
        torch.testing.assert_close(single.mean[0], batch.mean[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single.log_var[0], batch.log_var[i], rtol=1e-4, atol=1e-5)


def test_decode_gives_expected_values(tiny_vae: MultimodalVAE) -> None:
    z = torch.randn(5, tiny_vae.latent)
    assert tiny_vae.decode("image", z).shape == (5, 1, 8, 8)
    assert torch.equal(tiny_vae.decode("image", z), tiny_vae.decoders["image"](z).sigmoid())
    assert torch.equal(tiny_vae.decode("vector", z), tiny_vae.decoders["vector"](z))
    torch.testing.assert_close(tiny_vae.decode("text", z).exp().sum(-1), torch.ones(5, 3))


@pytest.fixture
def linear() -> tuple[MultimodalVAE, dict[str, Tensor]]:
    """p(x_m | z) = N(W_m z + b_m, s_m^2): a linear model, all of whose integrals have a closed form."""
    torch.manual_seed(0)
    modalities = [
        VectorModality(name="a", size=3, scale=0.5, weight=1.0),
        VectorModality(name="b", size=2, scale=2.0, weight=1.7),
    ]
    vae = MultimodalVAE(modalities, NetworkSizes(latent=4, features=8, hidden=8, width=1), beta=1.3)
    for modality in modalities:
        vae.decoders[modality.name] = nn.Linear(4, modality.size)
    return vae.requires_grad_(False), {m.name: torch.randn(ROWS, m.size) for m in modalities}


def closed_form(vae: MultimodalVAE, arrays: dict[str, Tensor], q: Gaussian) -> Tensor:
    """E_q log N(x; W z + b, s^2) = log N(x; W mu + b, s^2) - tr(W Sigma W') / 2 s^2, and the KL of two Gaussians."""
    total = -vae.beta * 0.5 * (q.log_var.exp() + q.mean**2 - 1 - q.log_var).sum(1)
    for m in vae.modalities:
        network = vae.decoders[m.name]
        error = (arrays[m.name] - network(q.mean)).square().sum(1) + q.log_var.exp() @ network.weight.square().sum(0)
        constant = m.size * (math.log(m.scale) + 0.5 * math.log(2 * math.pi))
        total = total - vae.weights[m.name] * (0.5 * error / m.scale**2 + constant)
    return total


def test_objective_of_linear_model_equals_closed_form(linear: tuple[MultimodalVAE, dict[str, Tensor]]) -> None:
    """The noise points +-sqrt(L) e_i integrate a quadratic function exactly."""
    vae, arrays = linear
    q = random_gaussian(ROWS, 4, seed=5)
    points = antithetic((2.0 * torch.eye(4)).expand(ROWS, 4, 4))
    objective = vae.objective(arrays, torch.ones(ROWS, 2, dtype=torch.bool), q, standard_like(q), points)
    torch.testing.assert_close(objective, closed_form(vae, arrays, q))


def test_objective_of_linear_model_with_many_samples_is_close_to_closed_form(
    linear: tuple[MultimodalVAE, dict[str, Tensor]],
) -> None:
    vae, arrays = linear
    q = random_gaussian(ROWS, 4, seed=5)
    noise = torch.randn(ROWS, 20_000, 4, generator=torch.Generator().manual_seed(1))
    objective = vae.objective(arrays, torch.ones(ROWS, 2, dtype=torch.bool), q, standard_like(q), noise)
    torch.testing.assert_close(objective, closed_form(vae, arrays, q), rtol=0.02, atol=0.2)


def test_gradient_steps_on_linear_model_reach_exact_posterior(linear: tuple[MultimodalVAE, dict[str, Tensor]]) -> None:
    """Plain gradient steps with ``gradient`` converge to the mean of p(z | x), which has a closed form."""
    vae, arrays = linear
    present = torch.ones(ROWS, 2, dtype=torch.bool)
    precision, precision_mean = vae.beta * torch.eye(4), torch.zeros(ROWS, 4)
    for m in vae.modalities:
        network, weight = vae.decoders[m.name], vae.weights[m.name] / m.scale**2
        precision = precision + weight * network.weight.T @ network.weight
        precision_mean = precision_mean + weight * (arrays[m.name] - network.bias) @ network.weight
    q = random_gaussian(ROWS, 4, seed=5)
    points = antithetic((2.0 * torch.eye(4)).expand(ROWS, 4, 4))
    for _ in range(500):
        gradient, _ = vae.gradient(arrays, present, q, standard_like(q), points)
        q = Gaussian(q.mean + 0.1 * gradient.mean, q.log_var + 0.1 * gradient.log_var)
    torch.testing.assert_close(q.mean, torch.linalg.solve(precision, precision_mean.T).T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(q.log_var, (vae.beta / precision.diag()).log().expand(ROWS, 4), rtol=1e-3, atol=1e-3)
