"""Measured numbers <-> standardised numbers, with the mean and the standard deviation of the training rows."""

import numpy as np
from jaxtyping import Bool, Float32, Float64
from numpy.typing import NDArray

from concord.model.modality import VectorModality

MAX_DEVIATIONS = 1e9
"""Largest distance from the mean, in standard deviations: beyond any measurement, below an overflow in the networks."""


def standardise(modality: VectorModality, numbers: Float64[np.ndarray, "*rows size"]) -> Float32[np.ndarray, "*rows size"]:
    """(numbers - mean) / std, infinite or NaN where that cannot be a float32."""
    mean, std = statistics(modality)
    with np.errstate(over="ignore", invalid="ignore"):
        deviations: NDArray[np.float64] = (numbers - mean) / std
        if not np.isfinite(deviations).all():  # the difference of two finite numbers may exceed float64
            deviations = np.where(np.isfinite(deviations), deviations, numbers / std - mean / std)
        standardised: NDArray[np.float32] = deviations.astype(np.float32)
    return standardised


def within_range(standardised: Float32[np.ndarray, "*rows size"]) -> Bool[np.ndarray, "*rows size"]:
    """Which numbers are finite and at most ``MAX_DEVIATIONS`` standard deviations from the mean."""
    within: NDArray[np.bool_] = np.abs(standardised) <= MAX_DEVIATIONS  # False for NaN
    return within


def statistics(modality: VectorModality) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
    """Mean and standard deviation, each (size,); 0 and 1, each (), if the modality has none."""
    mean = np.array(0.0 if modality.mean is None else modality.mean)
    return mean, np.array(1.0 if modality.std is None else modality.std)
