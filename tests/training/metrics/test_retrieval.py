"""Recall where it is known without measuring."""

import numpy as np
import pytest

from training.metrics.retrieval import recall_at


def test_a_row_finds_itself() -> None:
    rows = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)  # more than one chunk
    assert recall_at(rows, rows) == {1: 1.0, 5: 1.0, 10: 1.0}
    assert recall_at(rows, 3 * rows) == {1: 1.0, 5: 1.0, 10: 1.0}  # lengths do not count
    assert recall_at(rows, -rows, (1, 699, 700)) == {1: 0.0, 699: 0.0, 700: 1.0}  # itself is the farthest


def test_the_own_row_at_a_known_place() -> None:
    """On a circle of n points turned by j and a half places, exactly 2 j points lie nearer than the own one."""
    n = 24
    for turns in range(4):
        angles = 2 * np.pi * np.arange(n) / n
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        angles = angles + 2 * np.pi * (turns + 0.25) / n
        turned = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        recalls = recall_at(circle, turned, tuple(range(1, 9)))
        assert recalls == {k: float(k > 2 * turns) for k in range(1, 9)}


def test_chance_is_k_of_n() -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(2, 2000, 16))
    for k, found in recall_at(queries, gallery, (10, 100, 1000)).items():
        expected = k / 2000
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_equal_embeddings_find_nothing() -> None:
    assert recall_at(np.ones((5, 3)), np.ones((5, 3)), (1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}
    assert recall_at(np.zeros((5, 3)), np.zeros((5, 3)), (1,)) == {1: 0.0}


def test_no_rows_have_no_recall() -> None:
    with pytest.raises(ValueError, match="received none"):
        recall_at(np.zeros((0, 2)), np.zeros((0, 2)))
