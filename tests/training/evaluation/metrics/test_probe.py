import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.training.evaluation.metrics.probe import balanced_points, linear_probe


def separable_rows(rows: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and labels. Each class has its axis, at ten standard deviations of the noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return np.eye(classes)[labels] * 10 + generator.normal(size=(rows, classes)), labels


def test_probe_of_separable_classes_is_one() -> None:
    assert linear_probe(*separable_rows(800, 10, 0), *separable_rows(300, 10, 1)) == 1.0


def test_probe_does_not_depend_on_the_scale_of_a_latent() -> None:
    """The latent that separates the classes is a millionth of the noise in the other latents."""
    generator = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    means = generator.normal(size=(1000, 3)) * 1e3
    means[:, 0] = (labels + generator.normal(size=1000) * 0.05) * 1e-3
    assert linear_probe(means[:600], labels[:600], means[600:], labels[600:]) == 1.0


def test_probe_of_labels_independent_of_the_means_is_chance() -> None:
    generator = np.random.default_rng(0)
    rows, classes = 4000, 10
    labels = generator.integers(classes, size=(2, rows))
    means = generator.normal(size=(2, rows, 16))
    accuracy = linear_probe(means[0], labels[0], means[1], labels[1])
    deviation = np.sqrt(0.1 * 0.9 / rows)  # of a binomial proportion with probability 1 / classes
    assert abs(accuracy - 0.1) < 5 * deviation


def test_probe_recognises_a_rare_class() -> None:
    """50 points sampled in proportion 1 : 99 would often contain no row of the rare class."""
    labels = np.where(np.arange(2000) % 100 == 0, 1, 0)
    means = np.random.default_rng(0).normal(size=(2000, 3)) + 6.0 * labels[:, None]
    assert linear_probe(means, labels, means[labels == 1], labels[labels == 1], points=50) == 1.0


def test_probe_is_reproducible_for_equal_seeds() -> None:
    generator = np.random.default_rng(0)
    means, labels = generator.normal(size=(600, 4)), generator.integers(5, size=600)
    means[:, 0] += labels
    first, repeated, other = (linear_probe(means, labels, means, labels, points=40, seed=seed) for seed in (3, 3, 4))
    assert first == repeated != other


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), points=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_balanced_points_are_distinct_and_balanced(labels: list[int], points: int, seed: int) -> None:
    array = np.array(labels)
    chosen = balanced_points(array, points, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(points, len(labels))
    taken, available = np.bincount(array[chosen], minlength=5), np.bincount(array, minlength=5)
    for share, rows in zip(taken, available, strict=True):
        assert share == rows or share >= taken.max() - 1  # all rows of the class, or an equal share up to rounding


@pytest.mark.parametrize(
    ("train_labels", "test_labels", "message"),
    [([0, 0, 0, 0], [0, 0], "two classes"), ([0, 1, -1, 1], [0, 1], "below 0"), ([0, 1, 0, 1], [], "test rows")],
)
def test_probe_of_unusable_labels_is_rejected(train_labels: list[int], test_labels: list[int], message: str) -> None:
    train = np.array(train_labels)
    test = np.array(test_labels, dtype=np.int64)
    with pytest.raises(ValueError, match=message):
        linear_probe(np.zeros((len(train), 2)), train, np.zeros((len(test), 2)), test)
