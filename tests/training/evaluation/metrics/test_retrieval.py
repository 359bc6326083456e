"""Recall of cases with a known value."""

import numpy as np
import pytest

from concord.training.evaluation.metrics.retrieval import recall_at


def test_recall_of_equal_embeddings_is_one() -> None:
    rows = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)  # more than one chunk
    assert recall_at(rows, rows) == {1: 1.0, 5: 1.0, 10: 1.0}
    assert recall_at(rows, 3 * rows) == {1: 1.0, 5: 1.0, 10: 1.0}  # the lengths of vectors do not matter
    assert recall_at(rows, -rows, (1, 699, 700)) == {1: 0.0, 699: 0.0, 700: 1.0}  # the matching row is the farthest


def test_recall_of_rotated_circle_is_one_above_the_known_rank() -> None:
    """After a rotation of a circle of n points by j + 1/4 steps, exactly 2 j points are nearer than the matching one."""
    n = 24
    for turns in range(4):
        angles = 2 * np.pi * np.arange(n) / n
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        angles = angles + 2 * np.pi * (turns + 0.25) / n
        turned = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        recalls = recall_at(circle, turned, tuple(range(1, 9)))
        assert recalls == {k: float(k > 2 * turns) for k in range(1, 9)}


def test_recall_of_independent_embeddings_is_chance() -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(2, 2000, 16))
    for k, recall in recall_at(queries, gallery, (10, 100, 1000)).items():
        expected = k / 2000
        assert abs(recall - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_recall_of_constant_embeddings_is_zero() -> None:
    assert recall_at(np.ones((5, 3)), np.ones((5, 3)), (1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}
    assert recall_at(np.zeros((5, 3)), np.zeros((5, 3)), (1,)) == {1: 0.0}


def test_recall_without_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="received none"):
        recall_at(np.zeros((0, 2)), np.zeros((0, 2)))
