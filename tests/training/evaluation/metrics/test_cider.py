"""CIDEr-D against values by hand and of the authors' code."""

import math

import numpy as np
import pytest

from concord.training.evaluation.metrics.cider import CiderD

BIRD, FISH = [["a", "red", "bird"]], [["a", "blue", "fish"]]


def score(text: str) -> float:
    """Score a text as that of the red bird. The word "a" is in both rows, so it has the weight 0; others have log 2."""
    return float(CiderD([BIRD, FISH])([text.split(), FISH[0]])[0])


def test_cider_of_the_reference_is_ten_times_the_share_of_ngram_lengths_that_it_has() -> None:
    assert score("a red bird") == pytest.approx(10 * 3 / 4)


def test_cider_of_another_text_is_the_mean_cosine_over_ngram_lengths() -> None:
    half = 1 / 2  # of two weighted words, one is shared; so of the pairs of words
    assert score("a red fish") == pytest.approx(10 * (half + half) / 4)
    assert score("a") == 0
    assert score("") == 0


def test_cider_counts_a_repeated_word_as_often_as_the_reference_has_it() -> None:
    words, pairs = (1 + 1) / math.sqrt((4 + 1) * 2), 1 / 2
    assert score("red red bird") == pytest.approx(10 * (words + pairs) / 4)


def test_cider_penalises_another_length() -> None:
    single = CiderD([[["red", "bird"]], [["blue", "fish"]]])
    words, pairs = 4 / math.sqrt(4 * 2 * 2), 2 / math.sqrt(5)
    clipped_words, clipped_pairs = words / 2, pairs / 2  # the reference has each once
    expected = 10 * math.exp(-(2**2) / (2 * 6**2)) * (clipped_words + clipped_pairs) / 4
    assert single([["red", "bird", "red", "bird"], []])[0] == pytest.approx(expected)


def test_cider_equals_the_code_of_the_authors() -> None:
    """The values are those of pycocoevalcap 1.2, ``CiderScorer(n=4, sigma=6.0)``."""
    references = [
        ["this bird has a red head and a black beak", "a small red bird with a short black beak"],
        ["a yellow bird sits on a branch", "this yellow bird has black wings", "the bird is yellow"],
        ["a large white gull over the sea"],
    ]
    texts = [
        "this bird has a red head with a black beak",
        "a yellow yellow bird has black black wings",
        "this bird is white",
    ]
    scores = CiderD([[text.split() for text in own] for own in references])([text.split() for text in texts])
    np.testing.assert_allclose(scores, [4.36436416665941, 2.1793562232804833, 0.6457833543816072])
