"""Mean average precision and F1 of cases with a known value."""

import numpy as np
import pytest

from concord.training.evaluation.metrics.attributes import f1, mean_average_precision

TRUTH = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=np.float32)


def test_map_of_perfect_order_is_one_and_ignores_constant_attributes() -> None:
    assert mean_average_precision(TRUTH, TRUTH) == (1.0, 0.5)


def test_map_of_worst_order_of_two_among_four_rows() -> None:
    """The two positive rows have ranks 3 and 4: (1/3 + 2/4) / 2."""
    precision = mean_average_precision(TRUTH, 1 - TRUTH - np.arange(4, dtype=np.float32)[:, np.newaxis] / 1000)
    assert precision is not None
    assert precision[0] == pytest.approx(5 / 12)


def test_map_of_equal_probabilities_is_chance() -> None:
    assert mean_average_precision(TRUTH, np.full_like(TRUTH, 0.5)) == (0.5, 0.5)


def test_map_without_varying_attributes_is_none() -> None:
    assert mean_average_precision(TRUTH[:, 2:], TRUTH[:, 2:]) is None
    assert mean_average_precision(TRUTH[:0], TRUTH[:0]) is None


def test_f1_is_micro_averaged() -> None:
    """The best threshold is 0.6: five predicted positives, four of them true, and eight actual positives."""
    probabilities = np.array([[0.9, 0.1, 0.9], [0.6, 0.1, 0.9], [0.1, 0.1, 0.9], [0.1, 0.0, 0.1]], dtype=np.float32)
    assert f1(TRUTH, probabilities) == pytest.approx(2 * 4 / (5 + 8))


def test_f1_threshold_of_rare_attributes_is_below_one_half() -> None:
    truth = np.zeros((100, 2), dtype=np.float32)
    truth[:30, 0] = 1
    same = np.broadcast_to(truth.mean(axis=0), truth.shape)  # 0.3 and 0
    assert f1(truth, same) == pytest.approx(2 * 30 / (100 + 30))


def test_f1_without_positives_is_zero() -> None:
    assert f1(TRUTH, TRUTH) == 1.0
    assert f1(TRUTH[:0], TRUTH[:0]) == 0.0
    assert f1(np.zeros_like(TRUTH), TRUTH) == 0.0
