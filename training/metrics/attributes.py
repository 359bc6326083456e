"""Attributes told from other modalities: mean average precision of the decoded probabilities."""

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
