"""Fréchet distance between features of generated and of real pictures (Dowson & Landau 1982; Heusel et al. 2017).

The features are those of our own judge's penultimate layer, so the figure is named FD with that name. It is no FID: Inception's
features give other numbers, and neither may be compared with the other.
"""

import numpy as np
from jaxtyping import Float

FEATURES = "penultimate layer of the judge"


def frechet_distance(one: Float[np.ndarray, "row feature"], other: Float[np.ndarray, "other feature"]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of the Gaussians with the rows' moments; 0 and above.

    The estimate is biased upward for few rows: compare sets of equal size only.

    Raises:
        ValueError: fewer than two rows on a side.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"a covariance needs two rows or more, received {len(one)} and {len(other)}")
    one, other = one.astype(np.float64), other.astype(np.float64)
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (one, other)]
    root = _root(covariances[0])
    cross = np.trace(_root(root @ covariances[1] @ root))
    means = np.square(one.mean(0) - other.mean(0)).sum()
    return max(0.0, float(means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross))


def _root(matrix: Float[np.ndarray, "feature feature"]) -> Float[np.ndarray, "feature feature"]:
    """Square root of a symmetric matrix; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
