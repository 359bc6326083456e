"""Log-likelihoods against torch.distributions, and for extreme decoder outputs."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Laplace, Normal

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.model.vae.likelihood import expectation, log_likelihood

IMAGES = [
    ImageModality(name="picture", channels=1, height=3, width=2, likelihood=likelihood, scale=0.4)
    for likelihood in ("laplace", "gaussian", "bernoulli")
]
VECTORS = [VectorModality(name="numbers", size=4, likelihood=likelihood, scale=2.5) for likelihood in ("gaussian", "laplace")]
TEXT = TextModality(name="word", length=5, alphabet=" abc")
BINARY = BinaryModality(name="traits", attributes=("a", "b", "c"))
WORDS = TextModality(name="title", length=3, unit="word", vocabulary=("a", "b"))
CLASSES = CategoricalModality(name="brand", classes=("a", "b", "c"))
ALL: list[Modality] = [*IMAGES, *VECTORS, TEXT, WORDS, CLASSES, BINARY]
CHOICES = TextModality | CategoricalModality


def kind_and_likelihood(modality: Modality) -> str:
    return f"{modality.kind}-{modality.likelihood}"


def shape_of_raw(modality: Modality) -> tuple[int, ...]:
    return (*modality.shape, modality.categories) if isinstance(modality, CHOICES) else modality.shape


def rows(modality: Modality, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(modality, CHOICES):
        return torch.randint(modality.categories, (count, *modality.shape), generator=generator)
    if isinstance(modality, VectorModality):
        return torch.randn(count, *modality.shape, generator=generator)
    if modality.likelihood == "bernoulli":
        return torch.randint(2, (count, *modality.shape), generator=generator).float()
    return torch.rand(count, *modality.shape, generator=generator)


def distribution(modality: Modality, raw: Tensor) -> Distribution:
    if isinstance(modality, CHOICES):
        return Independent(Categorical(logits=raw), 1)
    dimensions = len(modality.shape)
    if modality.likelihood == "bernoulli":
        return Independent(Bernoulli(logits=raw), dimensions)
    location = raw if isinstance(modality, VectorModality) else torch.sigmoid(raw)
    family = Laplace if modality.likelihood == "laplace" else Normal
    return Independent(family(location, modality.scale), dimensions)


@pytest.mark.parametrize("modality", ALL, ids=kind_and_likelihood)
def test_log_likelihood_and_gradient_equal_torch_distributions(modality: Modality) -> None:
    raw = 3 * torch.randn(6, *shape_of_raw(modality), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw.requires_grad_()
    x = rows(modality, 6)
    actual, expected = log_likelihood(modality, raw, x), distribution(modality, raw).log_prob(x.to(raw.dtype))
    torch.testing.assert_close(actual, expected)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value.sum(), raw) for value in (actual, expected))
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("modality", ALL, ids=kind_and_likelihood)
def test_log_likelihood_row_does_not_depend_on_the_batch(modality: Modality) -> None:
    raw, x = torch.randn(4, *shape_of_raw(modality)), rows(modality, 4)
    batch = log_likelihood(modality, raw, x)
    torch.testing.assert_close(torch.cat([log_likelihood(modality, raw[i : i + 1], x[i : i + 1]) for i in range(4)]), batch)


@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e10])
@pytest.mark.parametrize("modality", ALL, ids=kind_and_likelihood)
def test_log_likelihood_extreme_outputs_stay_finite(modality: Modality, size: float) -> None:
    signs = torch.where(torch.arange(4 * torch.Size(shape_of_raw(modality)).numel()) % 3 == 0, 1.0, -1.0)
    raw = (size * signs).reshape(4, *shape_of_raw(modality)).requires_grad_()
    value = log_likelihood(modality, raw, rows(modality, 4))
    (gradient,) = torch.autograd.grad(value.sum(), raw)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("modality", [IMAGES[2], BINARY], ids=kind_and_likelihood)
def test_log_likelihood_confident_wrong_bernoulli_equals_its_logit(modality: Modality) -> None:
    size = torch.Size(modality.shape).numel()
    raw, x = torch.full((1, *modality.shape), 200.0), torch.zeros(1, *modality.shape)
    assert log_likelihood(modality, raw, x).item() == -200.0 * size  # a plain log(sigmoid) would be -inf
    assert log_likelihood(modality, raw, 1 - x).item() == 0


@pytest.mark.parametrize("modality", ALL, ids=kind_and_likelihood)
def test_expectation_equals_torch_distributions(modality: Modality) -> None:
    raw = torch.randn(6, *shape_of_raw(modality))
    expected = expectation(modality, raw)
    if isinstance(modality, TextModality):
        torch.testing.assert_close(expected.exp(), Categorical(logits=raw).probs)
    elif isinstance(modality, CategoricalModality):
        torch.testing.assert_close(expected, Categorical(logits=raw[:, 0]).probs)
    else:
        torch.testing.assert_close(expected, distribution(modality, raw).mean)


def test_shifted_log_likelihood_is_the_mixture_of_all_shifts() -> None:
    modality = TextModality(name="word", length=5, alphabet=" abc", likelihood="shifted")
    raw = torch.randn(6, *shape_of_raw(modality), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = rows(modality, 6)
    shifts = torch.stack([log_likelihood(TEXT, raw.roll(shift, dims=1), x) for shift in range(5)])
    torch.testing.assert_close(log_likelihood(modality, raw, x), shifts.exp().mean(0).log())
    torch.testing.assert_close(log_likelihood(modality, raw, x.roll(2, dims=1)), log_likelihood(modality, raw, x))


def test_shifted_log_likelihood_extreme_outputs_have_nonzero_gradient() -> None:
    modality = TextModality(name="word", length=5, alphabet=" abc", likelihood="shifted")
    raw = (1e4 * torch.randn(3, *shape_of_raw(modality), generator=torch.Generator().manual_seed(1))).requires_grad_()
    log_likelihood(modality, raw, rows(modality, 3)).sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert raw.grad.any()
