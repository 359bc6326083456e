"""The Fréchet distance against the closed form for two Gaussians."""

import numpy as np
import pytest
import scipy.linalg

from concord.training.evaluation.metrics.frechet import frechet_distance


def moments(seed: int, features: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(features, rank))
    return generator.normal(size=features), factor @ factor.T


def rows_with(mean: np.ndarray, covariance: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Return rows whose sample moments are exactly the given ones."""
    noise = np.random.default_rng(seed).normal(size=(rows, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(noise, rowvar=False)))).T
    return mean + white @ scipy.linalg.sqrtm(covariance).real.T


def test_frechet_distance_of_one_dimensional_gaussians() -> None:
    """|m1 - m2|^2 + (s1 - s2)^2."""
    one, other = (rows_with(np.array([m]), np.array([[s**2]]), 100, 0) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    assert frechet_distance(one, other) == pytest.approx(9 + 2.25)


@pytest.mark.parametrize("rank", [5, 3])
def test_frechet_distance_equals_closed_form(rank: int) -> None:
    """Covariances that do not commute, with full and with reduced rank."""
    (mean, covariance), (other_mean, other) = (moments(seed, 5, rank) for seed in (1, 2))
    root = scipy.linalg.sqrtm(covariance).real
    expected = np.square(mean - other_mean).sum() + np.trace(
        covariance + other - 2 * scipy.linalg.sqrtm(root @ other @ root).real
    )
    distance = frechet_distance(rows_with(mean, covariance, 200, 3), rows_with(other_mean, other, 300, 4))
    assert distance == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(rows, rows + 1) == pytest.approx(8, rel=1e-4)


def test_frechet_distance_of_one_row_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 2 rows per set, received 1 and 9"):
        frechet_distance(np.zeros((1, 2)), np.zeros((9, 2)))
