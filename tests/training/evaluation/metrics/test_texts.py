"""Metrics of generated texts against counts by hand."""

import numpy as np
import pytest

from concord.model.modality import TextModality
from concord.training.evaluation.metrics.texts import distinct, known_pairs, pairs_of_texts, repeats, token_counts, written

WORDS = TextModality(name="caption", length=4, unit="word", vocabulary=("a", "red", "blue", "bird"))
A, RED, BLUE, BIRD = 2, 3, 4, 5
CHARACTERS = TextModality(name="code", length=4, alphabet=" xy")


def test_known_pairs_is_the_share_of_adjacent_tokens_of_training_texts() -> None:
    known = pairs_of_texts(WORDS, np.array([[A, RED, BIRD, 0], [A, BLUE, 0, 0], [BIRD, 0, 0, 0], [0, 0, 0, 0]]))
    assert known == {6 * A + RED, 6 * RED + BIRD, 6 * A + BLUE}
    generated = [(A, RED, BIRD), (A, BIRD), (BIRD,), (A, BLUE, BLUE)]
    assert known_pairs(WORDS, generated, known) == pytest.approx(3 / 5)
    assert known_pairs(WORDS, [(BIRD,), ()], known) is None


def test_pairs_of_characters_include_spaces_inside_a_text() -> None:
    assert pairs_of_texts(CHARACTERS, np.array([[1, 0, 2, 0]])) == {3 * 1 + 0, 3 * 0 + 2}


def test_repeats_is_the_share_of_tokens_that_equal_the_one_before() -> None:
    assert repeats([(A, A, A), (A, RED, A), (BIRD,)]) == pytest.approx(2 / 4)
    assert repeats([(BIRD,)]) is None


def test_distinct_is_the_number_of_different_texts_by_all() -> None:
    assert distinct([(A, RED), (A, RED), (RED, A), ()]) == pytest.approx(3 / 4)


def test_written_drops_padding_and_unknown_words() -> None:
    assert written(WORDS, np.array([A, 0, 1, BIRD])) == (A, BIRD)
    assert written(CHARACTERS, np.array([0, 1, 0, 2])) == (1, 0, 2)
    assert written(CHARACTERS, np.zeros(4, np.int64)) == ()


def test_token_counts_include_the_end() -> None:
    tokens = np.array([[A, 0, 0, 0], [A, 1, BIRD, 0], [A, A, A, A]])
    assert token_counts(WORDS, tokens).tolist() == [2, 4, 4]
