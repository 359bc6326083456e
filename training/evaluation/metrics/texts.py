"""Metrics of generated texts: whether they read like training texts, and whether they differ from each other."""

from collections.abc import Collection, Hashable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int64, Shaped

from concord.model.codec.text import text_from_tokens
from concord.model.modality import TextModality
from concord.model.token_sampling import text_lengths

Tokens = tuple[int, ...]
Words = tuple[Hashable, ...]
UNKNOWN_WORD = None
"""A word outside the vocabulary, among the words of a text."""


def written(modality: TextModality, tokens: Int64[np.ndarray, " length"]) -> Tokens:
    """Return the tokens of a text without padding around it, as ``codec.text_from_tokens`` writes them."""
    if modality.unit != "character":
        return tuple(token for token in tokens.tolist() if token and token != modality.unknown_token)
    places = np.flatnonzero(tokens)
    return tuple(tokens[places[0] : places[-1] + 1].tolist()) if len(places) else ()


def words(modality: TextModality, tokens: Int64[np.ndarray, " length"]) -> Words:
    """Return the words of a text in their order. A word outside the vocabulary keeps its place: ``UNKNOWN_WORD``."""
    if modality.unit == "word":
        return tuple(UNKNOWN_WORD if token == modality.unknown_token else token for token in tokens.tolist() if token)
    return tuple(text_from_tokens(modality, tokens).split())


def pairs_of_texts(modality: TextModality, tokens: Int64[np.ndarray, "text length"]) -> frozenset[int]:
    """Return the pairs of adjacent tokens in texts, each as first · categories + second."""
    position = np.arange(1, modality.length)
    codes = tokens[:, :-1] * modality.categories + tokens[:, 1:]
    return frozenset(np.unique(codes[position < text_lengths(tokens)[:, np.newaxis]]).tolist())


def known_pairs(modality: TextModality, texts: Sequence[Tokens], known: Collection[int]) -> float | None:
    """Return the share of pairs of adjacent tokens that occur in training texts. None if there is no pair.

    Args:
        known: of the training texts, from ``pairs_of_texts``.
    """
    pairs = [first * modality.categories + second for text in texts for first, second in pairwise(text)]
    return float(np.mean([pair in known for pair in pairs])) if pairs else None


def repeats(texts: Sequence[Tokens]) -> float | None:
    """Return the share of pairs of adjacent tokens that are the same token twice. None if there is no pair."""
    pairs = [first == second for text in texts for first, second in pairwise(text)]
    return float(np.mean(pairs)) if pairs else None


def distinct(texts: Sequence[Tokens]) -> float:
    """Return the number of different texts, divided by the number of texts."""
    return len(set(texts)) / len(texts)


def token_counts(modality: TextModality, tokens: Int64[np.ndarray, "text length"]) -> Shaped[np.ndarray, " text"]:
    """Return the number of tokens of each text, with its end unless it fills the whole length."""
    return np.asarray(np.minimum(text_lengths(tokens) + 1, modality.length))
