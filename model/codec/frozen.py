"""Picture or text -> input of a frozen encoder."""

import reprlib
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
"""Pixels from 0 to 255, or tokens without padding. A feature vector is float32."""
Prepared = EncoderInput | Float32[np.ndarray, " size"]


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
