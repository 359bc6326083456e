"""Linear probe: how much of the class a linear classifier reads from the posterior means."""

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


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
    points are balanced over the classes and standardise the features, so that the penalty (L2, C = 1) meets every latent alike.

    Args:
        points: training rows to fit; all where there are fewer. A class with too few rows leaves its share to the others.
        seed: of the draw.

    Returns:
        a fraction in [0, 1].

    Raises:
        ValueError: no test rows, fewer than two classes among the training rows, or an unknown label (below 0).
    """
    if len(test_means) == 0:
        raise ValueError("a probe needs test rows, received none")
    if min(train_labels.min(initial=0), test_labels.min(initial=0)) < 0:
        raise ValueError("a probe needs the class of every row, received labels below 0: leave these rows out")
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"a probe needs two classes or more, received {np.unique(train_labels).tolist()}")
    chosen = balanced_points(train_labels, points, seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    classifier.fit(train_means[chosen], train_labels[chosen])
    return float(classifier.score(test_means, test_labels))


def balanced_points(labels: Integer[np.ndarray, " row"], points: int, seed: int) -> NDArray[np.intp]:
    """Rows drawn at random without replacement, as many of each class as possible; (min(points, row),)."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(starts, counts)  # each class's first row, then each one's second, and so on
    place = np.empty_like(shuffled)
    place[shuffled] = np.arange(len(labels))
    return by_class[np.lexsort((place[by_class], turn))][:points]
