"""Linear probe: the accuracy of a linear classifier on posterior means."""

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

_CHUNK = 4096
"""Test rows per step: the classifier makes several copies of its input."""


def linear_probe(
    train_means: Float[np.ndarray, "train latent"],
    train_labels: Integer[np.ndarray, " train"],
    test_means: Float[np.ndarray, "test latent"],
    test_labels: Integer[np.ndarray, " test"],
    *,
    points: int = 500,
    seed: int = 0,
) -> float:
    """Accuracy on the test rows of a logistic regression fitted to a few training rows.

    The protocol of MMVAE (Shi et al. 2019) and MoPoE (Sutter et al. 2021): posterior means of 500 training points. Here the
    points are balanced over the classes. Features are standardised, so that the penalty (L2, C = 1) treats all latents alike.

    Args:
        points: number of training rows to fit; all rows if there are fewer. A class with too few rows leaves its share to the
            others.
        seed: of the random selection of training rows.

    Returns:
        a fraction in [0, 1].

    Raises:
        ValueError: no test rows, fewer than two classes among the training rows, or an unknown label (below 0).
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - 110 MiB, which most commands do without
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    if len(test_means) == 0:
        raise ValueError("the probe needs test rows, received none")
    if min(train_labels.min(initial=0), test_labels.min(initial=0)) < 0:
        raise ValueError("the probe needs the class of every row, received labels below 0. Remove these rows")
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"the probe needs at least two classes, received {np.unique(train_labels).tolist()}")
    chosen = balanced_points(train_labels, points, seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    classifier.fit(train_means[chosen], train_labels[chosen])
    parts = [slice(start, start + _CHUNK) for start in range(0, len(test_means), _CHUNK)]
    correct = sum(int((classifier.predict(test_means[part]) == test_labels[part]).sum()) for part in parts)
    return correct / len(test_means)


def balanced_points(labels: Integer[np.ndarray, " row"], points: int, seed: int) -> NDArray[np.intp]:
    """Return random rows without replacement, with class counts as equal as possible; (min(points, row),)."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    # Round robin over the classes: the first row of each class, then the second of each, and so on.
    rank_in_class = np.arange(len(labels)) - np.repeat(starts, counts)
    position = np.empty_like(shuffled)
    position[shuffled] = np.arange(len(labels))
    return by_class[np.lexsort((position[by_class], rank_in_class))][:points]
