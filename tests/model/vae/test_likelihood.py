"""Log-likelihoods against torch.distributions, and for extreme decoder outputs."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Laplace, Normal

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.model.vae.likelihood import expectation, log_likelihood, raw_channels

IMAGES = [
    ImageModality(name="picture", channels=1, height=3, width=2, likelihood=likelihood, scale=0.4)
    for likelihood in ("laplace", "gaussian", "bernoulli")
]
MIXTURES = [
    ImageModality(name="picture", channels=3, height=3, width=2, likelihood="logistic_mixture", components=components)
    for components in (1, 4)
]
LEVELS = torch.arange(256, dtype=torch.float64) / 255
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
    if isinstance(modality, ImageModality):
        return (raw_channels(modality), *modality.shape[1:])
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


@pytest.mark.parametrize("modality", [*ALL, *MIXTURES], ids=kind_and_likelihood)
def test_log_likelihood_row_does_not_depend_on_the_batch(modality: Modality) -> None:
    raw, x = torch.randn(4, *shape_of_raw(modality)), rows(modality, 4)
    batch = log_likelihood(modality, raw, x)
    torch.testing.assert_close(torch.cat([log_likelihood(modality, raw[i : i + 1], x[i : i + 1]) for i in range(4)]), batch)


@pytest.mark.parametrize("size", [0.0, 1e2, 1e4, 1e10])
@pytest.mark.parametrize("modality", [*ALL, *MIXTURES], ids=kind_and_likelihood)
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


def mixture_levels(components: int, size: float) -> tuple[ImageModality, Tensor, Tensor]:
    """A grey picture whose pixels all have the same parameters, these parameters, and the log-probability of each level."""
    modality = ImageModality(
        name="picture", channels=1, height=2, width=2, likelihood="logistic_mixture", components=components
    )
    generator = torch.Generator().manual_seed(components)
    raw = size * torch.randn(1, 3 * components, 1, 1, generator=generator, dtype=torch.float64).expand(-1, -1, 2, 2)
    pictures = LEVELS.view(256, 1, 1, 1).expand(-1, -1, 2, 2)
    return modality, raw, log_likelihood(modality, raw.expand(256, -1, -1, -1), pictures) / 4


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("components", [1, 4])
def test_logistic_mixture_probabilities_of_all_levels_sum_to_one(components: int, size: float) -> None:
    *_, levels = mixture_levels(components, size)
    torch.testing.assert_close(levels.exp().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("components", [1, 4])
def test_logistic_mixture_expectation_equals_the_mean_of_all_levels(components: int) -> None:
    modality, raw, levels = mixture_levels(components, 2.0)
    assert abs((levels.exp() * LEVELS).sum() - expectation(modality, raw)[0, 0, 0, 0]) < 1e-4
    extreme = expectation(modality, 1e4 * torch.randn(50, 3 * components, 2, 2))
    assert extreme.min() >= 0
    assert extreme.max() <= 1


def test_logistic_mixture_log_likelihood_equals_a_plain_sum_over_components() -> None:
    """Channels of a pixel share the component. All values are between the lowest and the highest level."""
    modality = MIXTURES[1]
    raw = torch.randn(5, *shape_of_raw(modality), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.randint(1, 255, (5, *modality.shape), generator=torch.Generator().manual_seed(4)).double() / 255
    logits, location, scale = raw.split((4, 12, 12), dim=1)
    total = torch.zeros(5, 3, 2, dtype=torch.float64)
    for k in range(4):
        product = torch.softmax(logits, 1)[:, k]
        for c in range(3):
            mean, width = location[:, 3 * k + c].sigmoid(), torch.exp(-7 * torch.sigmoid(scale[:, 3 * k + c] - 1))
            edges = [torch.sigmoid((x[:, c] + edge - mean) / width) for edge in (-0.5 / 255, 0.5 / 255)]
            product = product * (edges[1] - edges[0])
        total = total + product
    torch.testing.assert_close(log_likelihood(modality, raw, x), total.log().sum((1, 2)))


def test_logistic_mixture_gradient_far_from_the_data_points_to_it() -> None:
    modality = MIXTURES[0]
    raw = torch.full((1, *shape_of_raw(modality)), 4.0)
    raw[:, 4:] = 8.0  # the smallest scale: both sigmoids are 1, a plain difference is 0
    raw.requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(modality, raw, torch.zeros(1, *modality.shape)).sum(), raw)
    assert (gradient[:, 1:4] < 0).all()


@pytest.mark.parametrize("choice", ["modality", "channel"])
@pytest.mark.parametrize("family", ["laplace", "gaussian"])
def test_learned_scale_log_likelihood_and_gradient_equal_torch_distributions(family: str, choice: str) -> None:
    modality = ImageModality(name="picture", channels=3, height=3, width=2, likelihood=family, learned_scale=choice)
    raw = torch.randn(6, *modality.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_scale = torch.tensor([-2.0, -1.0, 0.5] if choice == "channel" else [-1.5], dtype=torch.float64).view(-1, 1, 1)
    log_scale.requires_grad_()
    x = rows(modality, 6).double()
    likelihood = Independent((Laplace if family == "laplace" else Normal)(raw.sigmoid(), log_scale.exp()), 3)
    actual, expected = log_likelihood(modality, raw, x, log_scale), likelihood.log_prob(x)
    torch.testing.assert_close(actual, expected)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value.sum(), log_scale) for value in (actual, expected))
    torch.testing.assert_close(gradient, expected_gradient)


def test_learned_scale_of_a_likelihood_without_scale_is_rejected() -> None:
    for likelihood in ("bernoulli", "logistic_mixture"):
        with pytest.raises(ValueError, match='needs likelihood = "laplace" or "gaussian"'):
            ImageModality(name="picture", channels=3, height=3, width=2, likelihood=likelihood, learned_scale="modality")


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
