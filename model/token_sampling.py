"""Generation of a text token by token from the log-probabilities of the next token: greedy, temperature, top-p."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray

from concord.model.modality import TextModality

NextToken = Callable[[Int64[np.ndarray, " batch"], int], Float32[np.ndarray, "batch token"]]
"""(the previous token of each row, number of tokens before the next one) -> its log-probabilities. It keeps the state."""


def sample_tokens(
    modality: TextModality,
    next_token: NextToken,
    noise: Float32[np.ndarray, "batch length"],
    temperature: Float32[np.ndarray, " batch"],
    top_p: Float32[np.ndarray, " batch"],
) -> Int64[np.ndarray, "batch length"]:
    """Token ids of one text for each row, padded with 0. A text has at least one token, and no unknown one.

    Args:
        next_token: called with the number after the last token of the modality, which means start and end, before the first
            token. The last of the log-probabilities is that of the end.
        noise: uniform in [0, 1). Token t depends on the noise of positions up to t only.
        temperature: 0 takes the most likely token. Other values divide the log-probabilities.
        top_p: in (0, 1]. Only the most likely tokens whose probabilities sum up to it are sampled (Holtzman et al. 2020).

    Raises:
        FloatingPointError: a log-probability is NaN.
    """
    end = modality.categories
    banned = [token for token in (modality.unknown_token, 0 if modality.unit != "character" else None) if token is not None]
    tokens = np.zeros(noise.shape, np.int64)
    previous = np.full(len(noise), end, np.int64)
    unfinished = np.ones(len(noise), bool)
    for position in range(modality.length):
        scores = next_token(previous, position).astype(np.float64)
        if np.isnan(scores).any():
            raise FloatingPointError(f"the decoder of {modality.name} returned NaN")
        scores[:, banned] = -np.inf
        if position == 0:
            scores[:, [0, end]] = -np.inf
        previous = np.where(temperature > 0, _sample(scores, noise[:, position], temperature, top_p), scores.argmax(1))
        unfinished &= previous != end
        tokens[:, position] = np.where(unfinished, previous, 0)
        if not unfinished.any():
            break
    return tokens


def token_log_probabilities(
    modality: TextModality, next_token: NextToken, tokens: Int64[np.ndarray, "batch length"]
) -> Float32[np.ndarray, "batch length"]:
    """Log-probability of each token of given texts, including the first one after the last: the end. 0 after that.

    Args:
        next_token: as in ``sample_tokens``.
    """
    end, rows = modality.categories, np.arange(len(tokens))
    lengths = text_lengths(tokens)
    found = np.zeros(tokens.shape, np.float32)
    previous = np.full(len(tokens), end, np.int64)
    for position in range(modality.length):
        observed = np.where(lengths == position, end, tokens[:, position])
        scores = next_token(previous, position)
        found[:, position] = np.where(position <= lengths, scores[rows, observed], 0)
        previous = tokens[:, position]
    return found


def text_lengths(tokens: Int64[np.ndarray, "text length"]) -> Int64[np.ndarray, " text"]:
    """Number of tokens of each text up to the last one that is not padding."""
    return np.asarray(((tokens != 0) * np.arange(1, tokens.shape[1] + 1)).max(axis=1, initial=0))


def _sample(
    scores: Float[np.ndarray, "batch token"], noise: NDArray[Any], temperature: NDArray[Any], top_p: NDArray[Any]
) -> NDArray[Any]:
    """One token of each row by the inverse of the cumulative distribution, in the order of the ids."""
    if not (temperature > 0).any():
        return np.zeros(len(scores), np.int64)
    scaled = scores / np.where(temperature > 0, temperature, 1)[:, np.newaxis]
    probabilities = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if (top_p < 1).any():
        ranked = np.sort(probabilities, axis=1)[:, ::-1]
        kept = (np.cumsum(ranked, axis=1) - ranked < top_p[:, np.newaxis]).sum(axis=1)
        least = np.take_along_axis(ranked, np.maximum(kept, 1)[:, np.newaxis] - 1, axis=1)  # top_p may round to 0
        probabilities[probabilities < least] = 0
    cumulative = np.cumsum(probabilities, axis=1)
    return np.asarray((cumulative <= noise[:, np.newaxis] * cumulative[:, -1:]).sum(axis=1))
