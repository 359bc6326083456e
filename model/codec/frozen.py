"""Picture or text -> input of a frozen encoder."""

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8
from PIL import Image

from concord.model.codec.errors import DEFAULT_LIMITS, CodecError, Limits, json_type
from concord.model.codec.image import pixels_from_file, pixels_from_image
from concord.model.encoder import MAX_TOKENIZER_BYTES, EncoderDescription, ImagePreprocessing, TextPreprocessing

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

EncoderInput = UInt8[np.ndarray, "3 height width"] | Int32[np.ndarray, "_"]
"""Pixels from 0 to 255; or tokens without padding, of one text or of several with -1 between them. Features are float32."""
Prepared = EncoderInput | Float32[np.ndarray, " size"]
MAX_TEXTS = 16
"""Most texts of one modality in a request."""
_BOUNDARY = np.array([-1], dtype=np.int32)


class Preprocessor:
    """Prepares values for one frozen encoder. Thread-safe.

    Args:
        tokenizer: content of the tokenizer.json, of an encoder of texts.

    Raises:
        ValueError: the tokenizer is missing, too large or damaged.
        ImportError: the package ``tokenizers`` is not installed.
    """

    def __init__(self, description: EncoderDescription, tokenizer: bytes | None) -> None:
        self.description = description
        self._tokenizer = None if tokenizer is None else _load_tokenizer(tokenizer)
        if isinstance(description.preprocessing, TextPreprocessing) and self._tokenizer is None:
            raise ValueError("an encoder of texts needs a tokenizer.json")

    @property
    def image(self) -> ImagePreprocessing:
        """What a picture becomes. Only of an encoder of pictures."""
        assert isinstance(self.description.preprocessing, ImagePreprocessing)
        return self.description.preprocessing

    def pixels(self, picture: bytes | Image.Image, limits: Limits) -> Prepared:
        """Pixels of a picture, resized and cropped.

        Raises:
            CodecError: the picture cannot be read or is too large.
        """
        if isinstance(picture, bytes):
            return pixels_from_file(self.image, picture, limits)
        return pixels_from_image(self.image, picture)

    def texts(self, value: object, too_long: Literal["refuse", "cut"], limits: Limits) -> Prepared:
        """Tokens of a text, or of a list of texts of the same thing, see ``joined``.

        Raises:
            CodecError: as ``tokens``; or the list is empty, has more than ``MAX_TEXTS`` texts, or too many characters in total.
        """
        if not isinstance(value, list):
            return self.tokens(value, too_long, limits)
        if not 1 <= len(value) <= MAX_TEXTS:
            raise CodecError(
                "bad_text",
                f"the list has {len(value)} texts, 1 to {MAX_TEXTS} are allowed: "
                f"{'send fewer' if value else 'leave the modality out if it is absent'}",
            )
        characters = sum(len(text) for text in value if isinstance(text, str))
        if characters > limits.text_characters:
            raise CodecError(
                "too_large", f"the texts have {characters} characters in total, {limits.text_characters} are allowed"
            )
        parts = []
        for index, text in enumerate(value):
            try:
                parts.append(self.tokens(text, too_long, limits))
            except CodecError as error:
                error.pointer = f"/{index}"
                raise
        return joined(parts)

    def tokens(self, text: object, too_long: Literal["refuse", "cut"], limits: Limits) -> Prepared:
        """Tokens of a text, with those that the tokenizer adds.

        Raises:
            CodecError: not a text, empty, or longer than the network reads and ``too_long`` is ``refuse``.
        """
        if not isinstance(text, str):
            raise CodecError("wrong_type", f"a text is a string; received {json_type(text)}")
        if len(text) > limits.text_characters:
            raise CodecError("too_large", f"the text has {len(text)} characters, {limits.text_characters} are allowed")
        if not text.strip():
            raise CodecError("bad_text", "the text is empty: leave the modality out if it is absent")
        preprocessing = self._text
        encoding = self._encode(text)
        tokens = encoding.ids
        if len(tokens) > preprocessing.length:
            if too_long == "refuse":
                received = f"the text has {len(tokens)} tokens, the encoder reads {preprocessing.length}"
                raise CodecError("bad_text", f"{received}: shorten it")
            added = encoding.special_tokens_mask
            last = len(tokens) - 1 if added[-1] else len(tokens)  # a token at the end, such as [SEP], is kept
            tokens = tokens[: preprocessing.length - len(tokens) + last] + tokens[last:]
        return np.array(tokens or [preprocessing.pad], dtype=np.int32)

    def golden_input(self, content: bytes) -> Prepared:
        """Input of the content of a golden file, a picture or a text. A text that is too long is cut."""
        if isinstance(self.description.preprocessing, ImagePreprocessing):
            return self.pixels(content, DEFAULT_LIMITS)
        return self.tokens(content.decode(), "cut", DEFAULT_LIMITS)

    def is_too_long(self, text: str) -> bool:
        """Whether a text has more tokens than the network reads."""
        return len(self._encode(text)) > self._text.length

    @property
    def _text(self) -> TextPreprocessing:
        assert isinstance(self.description.preprocessing, TextPreprocessing)
        return self.description.preprocessing

    def _encode(self, text: str) -> "Encoding":
        assert self._tokenizer is not None
        try:
            return self._tokenizer.encode(self._text.prefix + text)
        except Exception as error:  # of a text with half a surrogate pair
            raise CodecError("bad_text", f"the tokenizer cannot read the text {reprlib.repr(text)}") from error


def is_input(array: Shaped[np.ndarray, "..."]) -> bool:
    """Whether an array is the input of a frozen encoder. No array of a modality has its type."""
    return array.dtype.char in "Bi"  # uint8 and int32: compared as characters, since every row of a request passes here


def joined(texts: Sequence[Prepared]) -> Prepared:
    """The input of an encoder for several texts of the same thing, whose feature is the mean of theirs; or that mean.

    Args:
        texts: at least one, all of them tokens or all of them feature vectors.
    """
    if not is_input(texts[0]):
        return np.asarray(np.mean(texts, axis=0, dtype=np.float32))
    return np.concatenate([part for text in texts for part in (_BOUNDARY, text)][1:])


def separated(prepared: EncoderInput) -> Sequence[EncoderInput]:
    """The texts that ``joined`` has joined. Any other input is returned as the only one."""
    if count_inputs(prepared) == 1:
        return [prepared]
    bounds = np.flatnonzero(prepared == _BOUNDARY)
    return [part[part != _BOUNDARY] for part in np.split(prepared, bounds)]


def count_inputs(array: Shaped[np.ndarray, "..."]) -> int:
    """Number of pictures or texts that a frozen encoder reads of an array. 0: the array is no input of one."""
    if not is_input(array):
        return 0
    return 1 if array.ndim > 1 else 1 + int(np.count_nonzero(array == _BOUNDARY))


def _load_tokenizer(content: bytes) -> "Tokenizer":
    from tokenizers import Tokenizer  # noqa: PLC0415 - only bundles with an encoder of texts need it

    if len(content) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"the tokenizer has {len(content):,} bytes, {MAX_TOKENIZER_BYTES:,} are allowed")
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"the tokenizer.json cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
