"""Text <-> tokens.

A text is normalised (NFKC), lowercased if the modality says so, stripped of white space at both ends, split into tokens, and
padded on the right with token 0.

- ``unit = "character"``: a character outside the alphabet is an error. If the alphabet contains U+FFFD, the character becomes
  that token instead.
- ``unit = "word"``: a word is a run of letters and digits with their combining marks; it may contain apostrophes, hyphens,
  dots and zero-width joiners inside. All other characters separate words and are dropped. In scripts without spaces between
  words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character with its marks is a word, as in Unicode's word boundaries.
  A word outside the vocabulary becomes the unknown token: its position is kept, its meaning is lost.
- ``unit = "subword"``: frequent words and parts of words, see ``subwords``. Every text has subwords.
- A text with too many tokens is an error, or is cut if the modality says so.

The unknown token is never generated: the most likely of the other tokens is used instead.

Source: Unicode Standard Annex #29, Unicode Text Segmentation (https://unicode.org/reports/tr29/).
"""

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import regex
from jaxtyping import Int64, Shaped

from concord.model.codec import subwords
from concord.model.codec.errors import CodecError, Limits, json_type
from concord.model.modality import FIRST_WORD, Segmentation, TextModality

_LETTERS = re.compile(r"\w+(?:[-'\u2019.]\w+)*")
_UNSPACED = r"[\p{L}&&\p{Word_Break=Other}]"
"""A letter that UAX 29 separates from the next letter: its script has no spaces between words."""
_LETTER = rf"[[\p{{L}}\p{{N}}_]--{_UNSPACED}]"
_RUN = rf"{_LETTER}(?:[\p{{L}}\p{{N}}_\p{{M}}\u200c\u200d--{_UNSPACED}]*[[\p{{L}}\p{{N}}_\p{{M}}]--{_UNSPACED}])?"
_CHARACTER = rf"{_UNSPACED}[\p{{M}}\p{{Grapheme_Cluster_Break=SpacingMark}}]*"
_WORD = regex.compile(rf"{_CHARACTER}|{_RUN}(?:[-'\u2019.]{_RUN})*", regex.V1)
_INVISIBLE = regex.compile(r"[\p{Word_Break=Format}\p{Variation_Selector}]+")
"""Soft hyphens, marks of the writing direction and the like, which belong to no word and separate none."""
_STARTS_UNSPACED = regex.compile(_UNSPACED, regex.V1)
_WITHOUT_SPACE = regex.compile(rf"{_UNSPACED}|[\p{{Word_Break=Katakana}}\p{{Han}}]", regex.V1)
_VOWELS_AM = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3"}
"""A vowel of Thai and of Lao, which NFKC splits into a mark and a letter."""


def tokenize(text: str, unit: str, lowercase: bool, segmentation: Segmentation = "unicode") -> list[str]:
    """The characters (``unit = "character"``) or words (``unit = "word"``) of a text, after normalisation.

    Args:
        segmentation: the rule for words, see ``TextModality.segmentation``.
    """
    if unit == "word" and segmentation == "unicode":
        text = unicodedata.normalize("NFKC", text)
        for parts, vowel in _VOWELS_AM.items():
            text = text.replace(parts, vowel)
        if lowercase:
            text = text.replace("\u0130", "i").lower()  # Python lowers this capital to i and a combining dot
        words: list[str] = _WORD.findall(_INVISIBLE.sub("", text))
        return words
    text = normalised(text, lowercase=lowercase)
    return _LETTERS.findall(text) if unit == "word" else list(text)


def normalised(text: str, *, lowercase: bool) -> str:
    """The text in Unicode's form NFKC, without white space around it, in lower case on demand."""
    text = unicodedata.normalize("NFKC", text)
    return (text.lower() if lowercase else text).strip()


def tokens_from_text(modality: TextModality, value: object, limits: Limits) -> Int64[np.ndarray, " length"]:
    """Token ids (length,) of a text.

    Raises:
        CodecError: ``wrong_type`` if the value is not a string, ``too_large`` if it exceeds ``limits``, ``bad_text`` if it is
            empty, has too many tokens or has characters that are not allowed.
    """
    if not isinstance(value, str):
        several = ": only a text with a frozen encoder may be a list of strings" if isinstance(value, list) else ""
        raise CodecError("wrong_type", f"a text is a string; received {json_type(value)}{several}")
    if len(value) > limits.text_characters:
        raise CodecError("too_large", f"the text has {len(value)} characters, {limits.text_characters} are allowed")
    known = _subwords(modality, value) if modality.unit == "subword" else _known_tokens(modality, value)
    if modality.too_long == "cut":
        known = known[: modality.length]
    if len(known) > modality.length:
        raise CodecError("bad_text", f"the text has {len(known)} {modality.unit}s, at most {modality.length} are allowed")
    tokens = np.zeros(modality.length, dtype=np.int64)
    tokens[: len(known)] = known
    return tokens


def _known_tokens(modality: TextModality, value: str) -> list[int]:
    pieces = tokenize(value, modality.unit, modality.lowercase, modality.segmentation)
    if not "".join(pieces).strip(modality.alphabet[:1]):
        problem = "has no word" if modality.unit == "word" and value.strip() else "is empty"
        raise CodecError("bad_text", f"the text {problem}: leave the modality out if it is absent")
    ids, unknown = modality.token_ids, modality.unknown_token
    outside = sorted(set(pieces) - (set(ids) - {"\0"}))
    if outside and unknown is None:
        raise CodecError(
            "bad_text", f"characters outside the alphabet: {reprlib.repr(outside)}; allowed are {modality.alphabet!a}"
        )
    return [ids.get(piece, unknown or 0) for piece in pieces]


def _subwords(modality: TextModality, value: str) -> list[int]:
    text = normalised(value, lowercase=modality.lowercase)
    if not text:
        raise CodecError("bad_text", "the text is empty: leave the modality out if it is absent")
    return subwords.encode(modality.merges or (), text)


def text_from_array(modality: TextModality, array: Shaped[np.ndarray, "length ..."]) -> str:
    """The text of what a decoder returns, see ``tokens_from_array``."""
    return text_from_tokens(modality, tokens_from_array(modality, array))


def tokens_from_array(modality: TextModality, array: Shaped[np.ndarray, "length ..."]) -> Int64[np.ndarray, " length"]:
    """The most likely token at each position. With the ``shifted`` likelihood the tokens are rotated so that the text starts
    after its longest run of padding.

    Args:
        array: log-probabilities (length, token), or token ids (length,) of a text with the ``autoregressive`` likelihood.
    """
    if modality.likelihood == "autoregressive":
        return array
    if modality.unknown_token is not None:
        array = np.where(np.arange(modality.categories) == modality.unknown_token, -np.inf, array)
    tokens = array.argmax(axis=-1)
    return _rotate_to_start(tokens) if modality.likelihood == "shifted" else tokens


def text_from_tokens(modality: TextModality, tokens: Int64[np.ndarray, " length"]) -> str:
    """The text of token ids, without padding and unknown words."""
    if modality.unit == "subword":
        return subwords.decode(modality.merges or (), [token for token in tokens.tolist() if token]).strip()
    if modality.unit == "word":
        words = [modality.vocabulary[token - FIRST_WORD] for token in tokens.tolist() if token >= FIRST_WORD]
        return " ".join(words) if modality.segmentation == "letters" else _join(words)
    return "".join(modality.alphabet[token] for token in tokens.tolist()).strip(modality.alphabet[0])


def is_unspaced(word: str) -> bool:
    """Whether a word of ``tokenize`` is a single character of a script without spaces between words."""
    return _STARTS_UNSPACED.match(word) is not None


def _join(words: Sequence[str]) -> str:
    """The words with spaces between them, except in scripts without, where ``tokenize`` finds the same words again."""
    parts = list(words[:1])
    for pair in pairwise(words):
        is_unspaced_pair = all(_WITHOUT_SPACE.match(word) for word in pair)
        parts += [pair[1]] if is_unspaced_pair and _WORD.findall("".join(pair)) == list(pair) else [" ", pair[1]]
    return "".join(parts)


def _rotate_to_start(tokens: Int64[np.ndarray, " length"]) -> Int64[np.ndarray, " length"]:
    """The tokens rotated so that they start after the first of the longest runs of padding."""
    length = len(tokens)
    written = np.flatnonzero(tokens)
    if len(written) in (0, length):
        return tokens
    gaps = np.diff(written, append=written[0] + length)
    return np.roll(tokens, -int(written[(int(gaps.argmax()) + 1) % len(written)]))
