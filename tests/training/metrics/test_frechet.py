"""Against the closed form for two Gaussians."""

import numpy as np
import pytest
import scipy.linalg

from training.metrics.frechet import frechet_distance


def moments(seed: int, features: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(features, rank))
    return generator.normal(size=features), factor @ factor.T


def rows_with(mean: np.ndarray, covariance: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Rows whose sample moments are exactly these."""
    noise = np.random.default_rng(seed).normal(size=(rows, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(noise, rowvar=False)))).T
    return mean + white @ scipy.linalg.sqrtm(covariance).real.T


def test_two_gaussians_of_one_dimension() -> None:
    """|m1 - m2|^2 + (s1 - s2)^2."""
    one, other = (rows_with(np.array([m]), np.array([[s**2]]), 100, 0) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    assert frechet_distance(one, other) == pytest.approx(9 + 2.25)


@pytest.mark.parametrize("rank", [5, 3])
def test_two_gaussians(rank: int) -> None:
    """Covariances that do not commute, of full rank and not."""
    (mean, covariance), (other_mean, other) = (moments(seed, 5, rank) for seed in (1, 2))
    root = scipy.linalg.sqrtm(covariance).real
    expected = np.square(mean - other_mean).sum() + np.trace(
        covariance + other - 2 * scipy.linalg.sqrtm(root @ other @ root).real
    )
    found = frechet_distance(rows_with(mean, covariance, 200, 3), rows_with(other_mean, other, 300, 4))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_set_has_no_distance_from_itself() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(rows, rows + 1) == pytest.approx(8, rel=1e-4)


def test_one_row_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two rows or more, received 1 and 9"):
        frechet_distance(np.zeros((1, 2)), np.zeros((9, 2)))
