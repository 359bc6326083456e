"""The objective against a brute-force sum and a closed form; its gradient against finite differences in float64."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Laplace, Normal

from model.modality import VectorModality
from model.vae.gaussian import Gaussian, antithetic, kl, standard_like
from model.vae.multimodal import MultimodalVAE

ROWS, SAMPLES = 4, 6


def draw(rows: int, latent: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(0.5 * torch.randn(rows, latent, generator=generator) for _ in range(2)))


def brute_force(
    vae: MultimodalVAE, arrays: dict[str, Tensor], present: Tensor, q: Gaussian, anchor: Gaussian, noise: Tensor
) -> Tensor:
    """The objective, one row, sample, modality and value at a time, in float64."""
    decoders = copy.deepcopy(vae.decoders).double()
    q, anchor, noise = Gaussian(*(t.double() for t in q)), Gaussian(*(t.double() for t in anchor)), noise.double()
    kinds: dict[str, Callable[[Tensor], Distribution]] = {
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
                    log_p = kinds[modality.kind](decoders[modality.name](z[None])[0]).log_prob(x).sum()
                    total = total + vae.weights[modality.name] * log_p / len(noise[row])
        divergence = kl(Gaussian(q.mean[row], q.log_var[row]), Gaussian(anchor.mean[row], anchor.log_var[row]))
        objectives.append(total - vae.beta * divergence)
    return torch.stack(objectives)


@pytest.fixture
def problem(tiny_vae: MultimodalVAE, make_rows) -> tuple[dict[str, Tensor], Tensor, Gaussian, Gaussian, Tensor]:
    """Complete and incomplete rows, each with an anchor of its own."""
    present = torch.tensor([[True] * 4, [True, False, False, True], [False, True, False, False], [True, False, True, True]])
    noise = antithetic(torch.randn(ROWS, SAMPLES // 2, tiny_vae.latent, generator=torch.Generator().manual_seed(3)))
    posteriors = [draw(ROWS, tiny_vae.latent, seed) for seed in (1, 2)]
    return make_rows(tiny_vae.modalities, ROWS), present, *posteriors, noise


def test_the_objective_is_its_sum(tiny_vae: MultimodalVAE, problem) -> None:
    torch.testing.assert_close(tiny_vae.objective(*problem).double(), brute_force(tiny_vae, *problem), rtol=1e-5, atol=1e-4)


def test_the_gradient_is_the_slope(tiny_vae: MultimodalVAE, problem) -> None:
    """Central differences of the brute-force sum, every coordinate of every row at once since rows are independent."""
    arrays, present, posterior, anchor, noise = problem
    gradient, objective = tiny_vae.gradient(*problem)
    torch.testing.assert_close(objective, tiny_vae.objective(*problem))
    step = 1e-6
    for part in range(2):
        for i in range(tiny_vae.latent):
            ends = []
            for sign in (1, -1):
                moved = [t.double() for t in posterior]
                moved[part][:, i] += sign * step
                ends.append(brute_force(tiny_vae, arrays, present, Gaussian(*moved), anchor, noise))
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(gradient[part][:, i].double(), slope, rtol=1e-4, atol=1e-3)


def test_a_step_is_the_refiner_on_that_gradient(tiny_vae: MultimodalVAE, problem) -> None:
    gradient, objective = tiny_vae.gradient(*problem)
    after, also = tiny_vae.refine_step(*problem)
    expected = tiny_vae.refiner(problem[2], gradient)
    assert torch.equal(after.mean, expected.mean)
    assert torch.equal(after.log_var, expected.log_var)
    assert torch.equal(objective, also)


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30])
def test_fillers_never_leak_into_a_step(tiny_vae: MultimodalVAE, problem, filler: float) -> None:
    """Nor into its gradient, where a product with zero would let a NaN through."""
    arrays, present, *rest = problem
    spoiled = {}
    for m, (name, x) in enumerate(arrays.items()):
        spoiled[name] = x.clone()
        spoiled[name][~present[:, m]] = 10**9 if x.dtype == torch.int64 else filler
    (after, objective), (found, found_objective) = (tiny_vae.refine_step(a, present, *rest) for a in (arrays, spoiled))
    assert torch.equal(found.mean, after.mean)
    assert torch.equal(found.log_var, after.log_var)
    assert torch.equal(found_objective, objective)


def test_rows_do_not_touch(tiny_vae: MultimodalVAE, problem) -> None:
    arrays, present, posterior, anchor, noise = problem
    together, _ = tiny_vae.refine_step(*problem)
    for i in range(ROWS):
        part = slice(i, i + 1)
        alone, _ = tiny_vae.refine_step(
            {name: x[part] for name, x in arrays.items()},
            present[part],
            Gaussian(*(t[part] for t in posterior)),
            Gaussian(*(t[part] for t in anchor)),
            noise[part],
        )
        torch.testing.assert_close(alone.mean[0], together.mean[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.log_var[0], together.log_var[i], rtol=1e-4, atol=1e-5)


def test_decoded_values_are_expectations(tiny_vae: MultimodalVAE) -> None:
    z = torch.randn(5, tiny_vae.latent)
    assert tiny_vae.decode("image", z).shape == (5, 1, 8, 8)
    assert torch.equal(tiny_vae.decode("image", z), tiny_vae.decoders["image"](z).sigmoid())
    assert torch.equal(tiny_vae.decode("vector", z), tiny_vae.decoders["vector"](z))
    torch.testing.assert_close(tiny_vae.decode("text", z).exp().sum(-1), torch.ones(5, 3))


@pytest.fixture
def linear() -> tuple[MultimodalVAE, dict[str, Tensor]]:
    """p(x_m | z) = N(W_m z + b_m, s_m^2): the one model whose every integral is known."""
    torch.manual_seed(0)
    modalities = [
        VectorModality(name="a", size=3, scale=0.5, weight=1.0),
        VectorModality(name="b", size=2, scale=2.0, weight=1.7),
    ]
    vae = MultimodalVAE(modalities, latent=4, features=8, hidden=8, width=1, beta=1.3)
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


def test_a_linear_model_has_its_closed_form(linear: tuple[MultimodalVAE, dict[str, Tensor]]) -> None:
    """The points +-sqrt(L) e_i integrate a quadratic exactly."""
    vae, arrays = linear
    q = draw(ROWS, 4, seed=5)
    points = antithetic((2.0 * torch.eye(4)).expand(ROWS, 4, 4))
    found = vae.objective(arrays, torch.ones(ROWS, 2, dtype=torch.bool), q, standard_like(q), points)
    torch.testing.assert_close(found, closed_form(vae, arrays, q))


def test_many_samples_come_close_to_it(linear: tuple[MultimodalVAE, dict[str, Tensor]]) -> None:
    vae, arrays = linear
    q = draw(ROWS, 4, seed=5)
    noise = torch.randn(ROWS, 20_000, 4, generator=torch.Generator().manual_seed(1))
    found = vae.objective(arrays, torch.ones(ROWS, 2, dtype=torch.bool), q, standard_like(q), noise)
    torch.testing.assert_close(found, closed_form(vae, arrays, q), rtol=0.02, atol=0.2)


def test_refinement_finds_the_exact_posterior_of_a_linear_model(linear: tuple[MultimodalVAE, dict[str, Tensor]]) -> None:
    """With the gradient that the code gives, plain ascent ends at the mean of p(z | x), known in closed form."""
    vae, arrays = linear
    present = torch.ones(ROWS, 2, dtype=torch.bool)
    precision, pull = vae.beta * torch.eye(4), torch.zeros(ROWS, 4)
    for m in vae.modalities:
        network, weight = vae.decoders[m.name], vae.weights[m.name] / m.scale**2
        precision = precision + weight * network.weight.T @ network.weight
        pull = pull + weight * (arrays[m.name] - network.bias) @ network.weight
    q = draw(ROWS, 4, seed=5)
    points = antithetic((2.0 * torch.eye(4)).expand(ROWS, 4, 4))
    for _ in range(500):
        gradient, _ = vae.gradient(arrays, present, q, standard_like(q), points)
        q = Gaussian(q.mean + 0.1 * gradient.mean, q.log_var + 0.1 * gradient.log_var)
    torch.testing.assert_close(q.mean, torch.linalg.solve(precision, pull.T).T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(q.log_var, (vae.beta / precision.diag()).log().expand(ROWS, 4), rtol=1e-3, atol=1e-3)
