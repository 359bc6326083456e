"""Mean average precision where it is known without measuring."""

import numpy as np
import pytest

from training.metrics.attributes import f1, mean_average_precision

TRUTH = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=np.float32)


def test_a_perfect_order_is_one_and_what_all_rows_have_does_not_count() -> None:
    assert mean_average_precision(TRUTH, TRUTH) == (1.0, 0.5)


def test_the_worst_order_of_two_among_four() -> None:
    """The two right ones come third and fourth: (1/3 + 2/4) / 2."""
    found = mean_average_precision(TRUTH, 1 - TRUTH - np.arange(4, dtype=np.float32)[:, np.newaxis] / 1000)
    assert found is not None
    assert found[0] == pytest.approx(5 / 12)


def test_equal_probabilities_are_chance() -> None:
    assert mean_average_precision(TRUTH, np.full_like(TRUTH, 0.5)) == (0.5, 0.5)


def test_attributes_that_tell_no_rows_apart_have_none() -> None:
    assert mean_average_precision(TRUTH[:, 2:], TRUTH[:, 2:]) is None
    assert mean_average_precision(TRUTH[:0], TRUTH[:0]) is None


def test_f1_counts_all_answers_together() -> None:
    """Yes from 0.6 up is best for these probabilities: five yeses, four of them right, of eight attributes that are there."""
    probabilities = np.array([[0.9, 0.1, 0.9], [0.6, 0.1, 0.9], [0.1, 0.1, 0.9], [0.1, 0.0, 0.1]], dtype=np.float32)
    assert f1(TRUTH, probabilities) == pytest.approx(2 * 4 / (5 + 8))


def test_f1_answers_below_one_half_where_attributes_are_rare() -> None:
    truth = np.zeros((100, 2), dtype=np.float32)
    truth[:30, 0] = 1
    same = np.broadcast_to(truth.mean(axis=0), truth.shape)  # 0.3 and 0
    assert f1(truth, same) == pytest.approx(2 * 30 / (100 + 30))


def test_f1_of_nothing_is_nothing() -> None:
    assert f1(TRUTH, TRUTH) == 1.0
    assert f1(TRUTH[:0], TRUTH[:0]) == 0.0
    assert f1(np.zeros_like(TRUTH), TRUTH) == 0.0
