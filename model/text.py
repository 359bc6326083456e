"""Text <-> tokens.

NFKC, lower case where the modality asks for it, white space stripped at the ends, padded on the right with token 0.

- ``unit = "character"``: a character outside the alphabet is refused; where the alphabet holds U+FFFD, it is read as that.
- ``unit = "word"``: runs of letters and digits, inner apostrophes, hyphens and dots included; all else parts words and is
  dropped. A word outside the vocabulary is read as the token of unknown words: its place counts, its meaning is lost.
- A text of too many tokens is refused, or cut where the modality says so.

Neither U+FFFD nor an unknown word is ever generated: the likeliest token of the others takes its place.
"""

import re
import reprlib
import unicodedata

import numpy as np
from jaxtyping import Float32, Int64

from model.modality import FIRST_WORD, TextModality
from model.wire import CodecError, Limits, kind

_WORD = re.compile(r"\w+(?:[-'\u2019.]\w+)*")


def pieces(text: str, unit: str, lowercase: bool) -> list[str]:
    """The characters or the words of a text, as tokens know them."""
    text = unicodedata.normalize("NFKC", text)
    text = (text.lower() if lowercase else text).strip()
    return _WORD.findall(text) if unit == "word" else list(text)


def tokens_from_text(modality: TextModality, value: object, limits: Limits) -> Int64[np.ndarray, " length"]:
    """Token ids of a text.

    Raises:
        CodecError: no string, empty, too long, or of characters that are not allowed.
    """
    if not isinstance(value, str):
        raise CodecError("wrong_type", f"a text is a string; received {kind(value)}")
    if len(value) > limits.text_characters:
        raise CodecError("too_large", f"the text has {len(value)} characters, {limits.text_characters} are allowed")
    found = pieces(value, modality.unit, modality.lowercase)
    if not "".join(found).strip(modality.alphabet[:1]):
        what = "has no word" if modality.unit == "word" and value.strip() else "is empty"
        raise CodecError("bad_text", f"the text {what}: leave the modality out if it is absent")
    ids, unknown = modality.token_ids, modality.unknown_token
    foreign = sorted(set(found) - (set(ids) - {"\0"}))
    if foreign and unknown is None:
        raise CodecError(
            "bad_text", f"characters outside the alphabet: {reprlib.repr(foreign)}; allowed are {modality.alphabet!a}"
        )
    if modality.too_long == "cut":
        found = found[: modality.length]
    if len(found) > modality.length:
        raise CodecError("bad_text", f"the text has {len(found)} {modality.unit}s, at most {modality.length} are allowed")
    tokens = np.zeros(modality.length, dtype=np.int64)
    tokens[: len(found)] = [ids.get(piece, unknown or 0) for piece in found]
    return tokens


def text_from_array(modality: TextModality, array: Float32[np.ndarray, "length token"]) -> str:
    """The likeliest text, token by token, from log-probabilities. One whose place says nothing (``shifted``) is turned until it
    begins behind its longest padding."""
    if modality.unknown_token is not None:
        array = np.where(np.arange(modality.categories) == modality.unknown_token, -np.inf, array)
    tokens = array.argmax(axis=-1)
    return text_from_tokens(modality, _turned(tokens) if modality.likelihood == "shifted" else tokens)


def text_from_tokens(modality: TextModality, tokens: Int64[np.ndarray, " length"]) -> str:
    """The text of token ids. Words that have no token of their own are missing from it."""
    if modality.unit == "word":
        return " ".join(modality.vocabulary[token - FIRST_WORD] for token in tokens.tolist() if token >= FIRST_WORD)
    return "".join(modality.alphabet[token] for token in tokens.tolist()).strip(modality.alphabet[0])


def _turned(tokens: Int64[np.ndarray, " length"]) -> Int64[np.ndarray, " length"]:
    """The same ring of tokens, cut where its first longest run of padding ends."""
    length = len(tokens)
    written = np.flatnonzero(tokens)
    if len(written) in (0, length):
        return tokens
    gaps = np.diff(written, append=written[0] + length)
    return np.roll(tokens, -int(written[(int(gaps.argmax()) + 1) % len(written)]))
