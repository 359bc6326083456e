"""Fréchet distance between features of generated and of real images (Dowson & Landau 1982; Heusel et al. 2017).

The features are those of the frozen classifier's penultimate layer. The metric is therefore called FD, not FID: Inception
features give other numbers, and the two must not be compared.
"""

import numpy as np
from jaxtyping import Float

FEATURES = "penultimate layer of the frozen classifier"


def frechet_distance(one: Float[np.ndarray, "row feature"], other: Float[np.ndarray, "other feature"]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of Gaussians with the moments of the rows; 0 or more.

    The estimate is biased upwards for few rows. Compare only sets of equal size.

    Raises:
        ValueError: fewer than two rows in one of the sets.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"the covariance needs at least 2 rows per set, received {len(one)} and {len(other)}")
    one, other = one.astype(np.float64), other.astype(np.float64)
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (one, other)]
    root = _square_root(covariances[0])
    cross = np.trace(_square_root(root @ covariances[1] @ root))
    means = np.square(one.mean(0) - other.mean(0)).sum()
    return max(0.0, float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross))


def _square_root(matrix: Float[np.ndarray, "feature feature"]) -> Float[np.ndarray, "feature feature"]:
    """Square root of a symmetric matrix. Eigenvalues that are negative by rounding are set to zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
