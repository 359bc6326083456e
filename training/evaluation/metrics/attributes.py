"""Metrics of binary attributes predicted from other modalities: mean average precision and F1 of decoded probabilities."""

import numpy as np
from jaxtyping import Float


def mean_average_precision(
    truth: Float[np.ndarray, "row attribute"], probabilities: Float[np.ndarray, "row attribute"]
) -> tuple[float, float] | None:
    """Average precision over the rows, averaged over the attributes that some rows have and others do not.

    Returns:
        the mean average precision and its chance level: the mean share of rows that have an attribute, which is the expectation
        for a random order of the rows. None if no attribute varies over the rows.
    """
    from sklearn.metrics import average_precision_score  # noqa: PLC0415 - 110 MiB, which most commands do without

    share = truth.mean(axis=0) if len(truth) else np.zeros(truth.shape[1])
    varying = np.flatnonzero((share > 0) & (share < 1))
    if not varying.size:
        return None
    precisions = [average_precision_score(truth[:, index], probabilities[:, index]) for index in varying]
    return float(np.mean(precisions)), float(share[varying].mean())


def f1(truth: Float[np.ndarray, "row attribute"], probabilities: Float[np.ndarray, "row attribute"]) -> float:
    """Micro-averaged F1: 2 true positives / (predicted positives + actual positives).

    One threshold for all attributes maximises the expected F1 under the predicted probabilities; the truth is not used for it.
    This threshold is half of the expected F1 (Lipton, Elkan & Naryanaswamy 2014). It is below 0.5, because probabilities of
    rare attributes seldom reach 0.5.

    Returns:
        a fraction in [0, 1]; 0 if there are no actual positives.
    """
    falling = -np.sort(-probabilities, axis=None).astype(np.float64)
    if not truth.any():
        return 0.0
    expected = 2 * np.cumsum(falling) / (np.arange(1, falling.size + 1) + falling.sum())
    predicted = probabilities >= falling[np.argmax(expected)]
    return float(2 * truth[predicted].sum() / (predicted.sum() + truth.sum()))
