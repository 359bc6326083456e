"""Metrics of numbers predicted from other modalities."""

import numpy as np
from jaxtyping import Float


def r2(truth: Float[np.ndarray, "row value"], predicted: Float[np.ndarray, "row value"]) -> float | None:
    """Return the coefficient of determination, a mean over the values that vary: 1 is exact, 0 is as good as their mean.

    None if no value varies.
    """
    errors, variances = np.square(truth - predicted).mean(0, dtype=np.float64), truth.var(0, dtype=np.float64)
    varying = variances > 0
    return float(np.mean(1 - errors[varying] / variances[varying])) if varying.any() else None
