"""Closed-form baselines against scikit-learn, and on cases whose result is known: aligned and independent modalities."""

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from concord.model.modality import CategoricalModality, ImageModality, TextModality, VectorModality
from concord.training.baselines.linear import cca, features, logistic, ridge, tuned_cca, tuned_ridge
from concord.training.evaluation.metrics.retrieval import recall_at

ROWS = 400


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_ridge_is_that_of_scikit_learn_on_standardised_features() -> None:
    x, y = 5 * normal(ROWS, 7, seed=0) + 3, normal(ROWS, 2, seed=1)
    y += x[:, :2]
    scaler = StandardScaler().fit(x)
    expected = Ridge(alpha=0.3 * ROWS).fit(scaler.transform(x), y).predict(scaler.transform(x))
    np.testing.assert_allclose(ridge(x, y, 0.3)(x), expected, rtol=1e-4, atol=1e-4)


def test_ridge_with_a_constant_feature_is_finite() -> None:
    x = normal(ROWS, 3, seed=0)
    x[:, 1] = 2.0
    assert np.isfinite(ridge(x, x[:, :1], 0.1)(x)).all()


def test_tuned_ridge_shrinks_more_where_features_say_nothing() -> None:
    x = normal(60, 40, seed=0)
    noise, signal = normal(60, 1, seed=1), x @ normal(40, 1, seed=2)
    assert np.abs(tuned_ridge(x, noise).weights).sum() < np.abs(ridge(x, noise, 0.01).weights).sum() / 3
    np.testing.assert_allclose(tuned_ridge(x, signal)(x), ridge(x, signal, 0.01)(x))


def test_correlations_of_cca_are_those_of_scikit_learn() -> None:
    shared = normal(ROWS, 3, seed=0)
    x = np.concatenate([shared + 0.5 * normal(ROWS, 3, seed=1), normal(ROWS, 2, seed=2)], axis=1)
    y = np.concatenate([shared @ normal(3, 3, seed=3) + normal(ROWS, 3, seed=4), normal(ROWS, 1, seed=5)], axis=1)
    one, other, correlations = cca(x, y, 3, 1e-9)
    reference = CCA(n_components=3, tol=1e-9, max_iter=10_000).fit(x, y)
    pairs = zip(*reference.transform(x, y), strict=True)
    scores = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(np.array(part).T for part in zip(*pairs, strict=True)), strict=True)]
    np.testing.assert_allclose(correlations, scores, atol=2e-3)
    for index, correlation in enumerate(correlations):
        assert np.corrcoef(one(x)[:, index], other(y)[:, index])[0, 1] == pytest.approx(correlation, abs=1e-3)


def test_cca_finds_rows_that_are_perfectly_aligned_and_no_others() -> None:
    x, rotation = normal(ROWS, 6, seed=0), np.linalg.qr(normal(6, 6, seed=1))[0]
    new = normal(100, 6, seed=2)
    one, other = tuned_cca(x, x @ rotation, 6)
    assert recall_at(one(new), other(new @ rotation))[1] == 1
    one, other = tuned_cca(x, normal(ROWS, 6, seed=3), 6)
    assert recall_at(one(new), other(normal(100, 6, seed=4)))[10] == pytest.approx(0.1, abs=0.08)


def test_logistic_regression_recovers_known_probabilities() -> None:
    """Classes sampled from a softmax of known weights. Weights of any unit give the same probabilities."""
    x, weights = normal(4000, 3, seed=0), np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    odds = np.exp(x @ weights)
    truth = odds / odds.sum(1, keepdims=True)
    sampled = (truth.cumsum(1) < np.random.default_rng(1).random((len(x), 1))).sum(1)
    classes = np.array([0, 1, 3])[sampled]  # the classes 2 and 4 have no rows
    probabilities = logistic(x * 100, classes, 5)(x * 100)
    assert np.abs(probabilities[:, [0, 1, 3]] - truth).mean() < 0.02
    assert not probabilities[:, [2, 4]].any()
    assert logistic(x, np.full(len(x), 2), 3)(x[:4]).tolist() == [[0, 0, 1]] * 4, "a single class is certain"


def test_logistic_regression_of_independent_features_predicts_the_frequencies() -> None:
    classes = np.arange(4000) % 4 // 3
    probabilities = logistic(normal(4000, 5, seed=2), classes, 2)(normal(100, 5, seed=3))
    np.testing.assert_allclose(probabilities, np.tile([0.75, 0.25], (100, 1)), atol=0.06)


def test_features_of_text_are_its_words_once_without_padding() -> None:
    text = TextModality(name="text", length=4, unit="word", vocabulary=("a", "b"))
    assert features(text, np.array([[2, 3, 2, 0], [1, 0, 0, 0]])).tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_features_of_a_class_are_one_hot_and_numbers_are_unchanged() -> None:
    kind = CategoricalModality(name="kind", classes=("a", "b", "c"))
    assert features(kind, np.array([[2], [0]])).tolist() == [[0, 0, 1], [1, 0, 0]]
    numbers = VectorModality(name="numbers", size=2)
    assert features(numbers, np.array([[1.5, -2.0]])).tolist() == [[1.5, -2.0]]


def test_features_of_an_image_tell_directions_and_colours() -> None:
    image = ImageModality(name="image", channels=3, height=16, width=12)
    stripes = np.zeros((4, 3, 16, 12), np.float32)
    stripes[0, :, ::4] = stripes[1, :, :, ::4] = 1.0
    stripes[2, 0] = stripes[3, 2] = 1.0
    found = features(image, stripes)
    distances = np.linalg.norm(found[:, None] - found, axis=-1)
    assert (distances + 10 * np.eye(4) > 0.5).all()
    brighter = features(image, np.minimum(stripes + 0.05, 1.0))
    assert (np.linalg.norm(brighter - found, axis=1) < 0.3).all()
