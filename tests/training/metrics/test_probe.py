import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics.probe import balanced_points, linear_probe


def corners(rows: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that sit at their class's own axis, far from each other for the little noise they have."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    return np.eye(classes)[labels] * 10 + generator.normal(size=(rows, classes)), labels


def test_separable_classes_are_all_recognised() -> None:
    assert linear_probe(*corners(800, 10, 0), *corners(300, 10, 1)) == 1.0


def test_scale_of_a_latent_does_not_matter() -> None:
    """What tells the classes apart is a millionth of the noise beside it."""
    generator = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    means = generator.normal(size=(1000, 3)) * 1e3
    means[:, 0] = (labels + generator.normal(size=1000) * 0.05) * 1e-3
    assert linear_probe(means[:600], labels[:600], means[600:], labels[600:]) == 1.0


def test_labels_independent_of_the_means_are_guessed() -> None:
    generator = np.random.default_rng(0)
    rows, classes = 4000, 10
    labels = generator.integers(classes, size=(2, rows))
    means = generator.normal(size=(2, rows, 16))
    accuracy = linear_probe(means[0], labels[0], means[1], labels[1])
    deviation = np.sqrt(0.1 * 0.9 / rows)  # of a binomial fraction with chance 1 / classes
    assert abs(accuracy - 0.1) < 5 * deviation


def test_a_class_seen_in_few_points_counts_as_much() -> None:
    """Drawn in proportion, 50 points of 1 : 99 would often hold no row of the rare class at all."""
    labels = np.where(np.arange(2000) % 100 == 0, 1, 0)
    means = np.random.default_rng(0).normal(size=(2000, 3)) + 6.0 * labels[:, None]
    assert linear_probe(means, labels, means[labels == 1], labels[labels == 1], points=50) == 1.0


def test_the_draw_depends_on_the_seed_alone() -> None:
    generator = np.random.default_rng(0)
    means, labels = generator.normal(size=(600, 4)), generator.integers(5, size=600)
    means[:, 0] += labels
    first, again, other = (linear_probe(means, labels, means, labels, points=40, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), points=st.integers(1, 80), seed=st.integers(0, 2**32))
def test_points_are_distinct_and_balanced(labels: list[int], points: int, seed: int) -> None:
    every = np.array(labels)
    chosen = balanced_points(every, points, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(points, len(labels))
    taken, available = np.bincount(every[chosen], minlength=5), np.bincount(every, minlength=5)
    for share, rows in zip(taken, available, strict=True):
        assert share == rows or share >= taken.max() - 1  # a class is exhausted, or has its share up to rounding


@pytest.mark.parametrize(
    ("train_labels", "test_labels", "message"),
    [([0, 0, 0, 0], [0, 0], "two classes"), ([0, 1, -1, 1], [0, 1], "below 0"), ([0, 1, 0, 1], [], "test rows")],
)
def test_what_cannot_be_probed_is_refused(train_labels: list[int], test_labels: list[int], message: str) -> None:
    train = np.array(train_labels)
    test = np.array(test_labels, dtype=np.int64)
    with pytest.raises(ValueError, match=message):
        linear_probe(np.zeros((len(train), 2)), train, np.zeros((len(test), 2)), test)
