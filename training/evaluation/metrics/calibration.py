"""Calibration: whether predicted probabilities, and the stated variance of a posterior, agree with what is observed."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from concord.model.vae.gaussian import Gaussian

BINS = 15
"""Intervals of equal width of a probability."""
LEVELS = (0.5, 0.9)
"""Nominal shares of the intervals of ``coverage``."""
SMALLEST = 1e-6
"""Probabilities below count as this one: a single impossible event would make a log loss infinite."""


def calibration_error(probabilities: Float[np.ndarray, " event"], happened: Bool[np.ndarray, " event"]) -> float:
    """Return the expected calibration error (Guo et al. 2017) of predicted probabilities, in [0, 1]; 0 is calibrated.

    The mean over ``BINS`` intervals, weighted by their number of events, of the distance between the mean probability and the
    share of events that happened.

    Raises:
        ValueError: no events.
    """
    if not len(probabilities):
        raise ValueError("calibration needs predictions, received none")
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    excess = np.bincount(bins, probabilities - happened, minlength=BINS)
    return float(np.abs(excess).sum() / len(probabilities))


def class_calibration(
    classes: Integer[np.ndarray, " row"], probabilities: Float[np.ndarray, "row category"]
) -> dict[str, float]:
    """Return ``log_loss`` in nats, and ``calibration_error`` of the most probable class of each row."""
    of_truth = probabilities[np.arange(len(classes)), classes]
    best = probabilities.argmax(1)
    return {
        "log_loss": float(-np.log(np.maximum(of_truth, SMALLEST)).mean()),
        "calibration_error": calibration_error(probabilities[np.arange(len(best)), best], best == classes),
    }


def attribute_calibration(
    truth: Float[np.ndarray, "row attribute"], probabilities: Float[np.ndarray, "row attribute"]
) -> dict[str, float]:
    """Return ``log_loss`` in nats for each attribute, and ``calibration_error`` of all of them together."""
    of_truth = np.where(truth > 0, probabilities, 1 - probabilities)
    return {
        "log_loss": float(-np.log(np.maximum(of_truth, SMALLEST)).mean()),
        "calibration_error": calibration_error(probabilities.ravel(), truth.ravel() > 0),
    }


def coverage(student: Gaussian, teacher: Gaussian, levels: Sequence[float] = LEVELS) -> Float[Tensor, "level batch"]:
    """Return the probability that a sample of the teacher lies in the central interval of the student, a mean over dimensions.

    In closed form. If the stated variance is right, the mean over rows is the nominal share of each interval. Below: the
    student is overconfident. Above: its variance is too large.

    Args:
        student: diagonal Gaussian whose variance is examined, such as the posterior of one modality.
        teacher: diagonal Gaussian of the same rows, such as the refined posterior of all modalities.
        levels: nominal shares of the intervals, in (0, 1).
    """
    std, other = (0.5 * student.log_var).exp(), (0.5 * teacher.log_var).exp()
    shares = []
    for level in levels:
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64))) * std
        upper, lower = ((student.mean + sign * half - teacher.mean) / other for sign in (1, -1))
        shares.append((torch.special.ndtr(upper) - torch.special.ndtr(lower)).mean(-1))
    return torch.stack(shares)
