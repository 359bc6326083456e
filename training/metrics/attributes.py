"""Attributes told from other modalities: mean average precision and F1 of the decoded probabilities."""

import numpy as np
from jaxtyping import Float
from sklearn.metrics import average_precision_score


def mean_average_precision(
    truth: Float[np.ndarray, "row attribute"], probabilities: Float[np.ndarray, "row attribute"]
) -> tuple[float, float] | None:
    """Average precision of each attribute over the rows, averaged over the attributes that some rows have and others lack.

    Returns:
        the mean, and what a random order of the rows would get: the mean share of rows that have an attribute. None where
        no attribute tells rows apart.
    """
    share = truth.mean(axis=0) if len(truth) else np.zeros(truth.shape[1])
    told = np.flatnonzero((share > 0) & (share < 1))
    if not told.size:
        return None
    precisions = [average_precision_score(truth[:, index], probabilities[:, index]) for index in told]
    return float(np.mean(precisions)), float(share[told].mean())


def f1(truth: Float[np.ndarray, "row attribute"], probabilities: Float[np.ndarray, "row attribute"]) -> float:
    """F1 of all answers together (micro-averaged): 2 right yeses / (yeses + attributes that are there).

    Yes is said from the one probability up that would be best if all probabilities were right; no truth takes part in that.
    It is half of the F1 expected then (Lipton, Elkan & Naryanaswamy 2014), below 0.5, which rare attributes seldom reach.

    Returns:
        a fraction in [0, 1]; 0 where there is nothing to tell.
    """
    falling = -np.sort(-probabilities, axis=None).astype(np.float64)
    if not truth.any():
        return 0.0
    expected = 2 * np.cumsum(falling) / (np.arange(1, falling.size + 1) + falling.sum())
    yes = probabilities >= falling[np.argmax(expected)]
    return float(2 * truth[yes].sum() / (yes.sum() + truth.sum()))
