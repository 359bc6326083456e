"""Generation token by token: greedy, temperature, top-p, and what is never generated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from concord.model.modality import TextModality
from concord.model.token_sampling import sample_tokens, token_log_probabilities

WORDS = TextModality(name="caption", length=4, unit="word", vocabulary=("red", "blue", "bird"), likelihood="autoregressive")
RED, BLUE, BIRD, END = 2, 3, 4, 5
CHARACTERS = TextModality(name="code", length=3, alphabet=" ab\ufffd", likelihood="autoregressive")


def constant(*probabilities: float) -> Callable[..., Any]:
    """A decoder that does not depend on the text."""
    with np.errstate(divide="ignore"):
        scores = np.log(np.array(probabilities, np.float32))
    return lambda previous, _: np.repeat(scores[np.newaxis], len(previous), axis=0)


def sample(modality: TextModality, next_token: Any, rows: int = 1, temperature: float = 1.0, top_p: float = 1.0) -> Any:
    noise = np.random.default_rng(0).random((rows, modality.length), dtype=np.float32)
    options = (np.full(rows, value, np.float32) for value in (temperature, top_p))
    return sample_tokens(modality, next_token, noise, *options)


def test_sample_tokens_without_temperature_takes_the_most_likely_token_until_the_end() -> None:
    def next_token(previous: Any, position: int) -> Any:
        scores = np.full((len(previous), 6), -9, np.float32)
        scores[:, {END: RED, RED: BIRD, BIRD: END}[int(previous[0])]] = 0
        assert position == {END: 0, RED: 1, BIRD: 2}[int(previous[0])]
        return scores

    assert sample(WORDS, next_token, temperature=0).tolist() == [[RED, BIRD, 0, 0]]


def test_sample_tokens_text_is_never_empty_and_has_no_unknown_token() -> None:
    words = sample(WORDS, constant(0.3, 0.3, 0.05, 0.05, 0.1, 0.2), rows=300)
    assert set(words[:, 0]) == {RED, BLUE, BIRD}
    assert set(words.ravel()) == {0, RED, BLUE, BIRD}
    characters = sample(CHARACTERS, constant(0.2, 0.2, 0.2, 0.2, 0.2), rows=300)
    assert set(characters[:, 0]) == {1, 2}
    assert 3 not in characters
    inside = characters[(characters[:, 2] > 0), 1]
    assert 0 in inside  # a space


def test_sample_tokens_after_the_end_there_is_only_padding() -> None:
    tokens = sample(WORDS, constant(0, 0, 0.2, 0.2, 0.1, 0.5), rows=200)
    ended = np.maximum.accumulate(tokens == 0, axis=1)
    assert (tokens[ended] == 0).all()
    assert 0 < (tokens[:, 3] > 0).mean() < 0.4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_tokens_frequencies_are_those_of_the_temperature(temperature: float) -> None:
    probabilities = np.array([0.6, 0.3, 0.1])
    first = sample(WORDS, constant(0, 0, *probabilities, 0), rows=20_000, temperature=temperature)[:, 0]
    expected = probabilities ** (1 / temperature)
    frequencies = [(first == token).mean() for token in (RED, BLUE, BIRD)]
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.012)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {BLUE}), (0.05, {BLUE}), (0.5, {BLUE}), (0.7, {BLUE, RED}), (1.0, {BLUE, RED, BIRD})]
)
def test_sample_tokens_top_p_keeps_the_most_likely_tokens(top_p: float, kept: set[int]) -> None:
    assert set(sample(WORDS, constant(0, 0, 0.3, 0.6, 0.1, 0), rows=500, top_p=top_p)[:, 0]) == kept


def test_sample_tokens_each_row_has_its_own_options_and_noise() -> None:
    next_token = constant(0, 0, 0.3, 0.4, 0.2, 0.1)
    noise = np.random.default_rng(0).random((50, 4), dtype=np.float32)
    temperature, top_p = np.tile([0, 1, 0.5, 1, 2], 10).astype(np.float32), np.tile([1, 0.5, 1, 0.9, 1], 10).astype(np.float32)
    together = sample_tokens(WORDS, next_token, noise, temperature, top_p)
    for row in range(50):
        part = slice(row, row + 1)
        alone = sample_tokens(WORDS, next_token, noise[part], temperature[part], top_p[part])
        np.testing.assert_array_equal(alone[0], together[row])
    assert len(np.unique(together[temperature == 0], axis=0)) == 1


def test_sample_tokens_nan_raises() -> None:
    with pytest.raises(FloatingPointError, match="decoder of caption"):
        sample(WORDS, constant(0, 0, np.nan, 0.5, 0.5, 0))


def test_token_log_probabilities_count_every_token_and_the_end() -> None:
    tokens = np.array([[RED, BIRD, 0, 0], [RED, RED, RED, RED]])
    found = token_log_probabilities(WORDS, constant(0.1, 0.1, 0.4, 0.1, 0.2, 0.1), tokens)
    np.testing.assert_allclose(np.exp(found), [[0.4, 0.2, 0.1, 1], [0.4, 0.4, 0.4, 0.4]], rtol=1e-5)
