"""What all kinds of wire values share: base64, the limits, and the error that says why a value is refused."""

import base64
import binascii
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Shaped

Code = Literal[
    "bad_base64",
    "bad_image",
    "bad_text",
    "bad_vector",
    "bad_attributes",
    "bad_class",
    "unsupported_media_type",
    "too_large",
    "wrong_type",
]

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\n\r\x0b\x0c"


class CodecError(ValueError):
    """A value that is no row of its modality.

    Attributes:
        code: what is wrong, for programs.
        detail: what was received, what is allowed and what to do, for readers.
        pointer: JSON pointer below the modality's value, empty where the whole value is wrong.
    """

    def __init__(self, code: Code, detail: str, pointer: str = "") -> None:
        super().__init__(code, detail, pointer)  # all of them, so that it can be pickled
        self.code: Code = code
        self.detail = detail
        self.pointer = pointer

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class Limits:
    """What is refused before any work is done on it."""

    image_bytes: int = 10 << 20
    """Of an image file, after base64."""
    image_pixels: int = 16_000_000
    """Width times height that an image file declares."""
    text_characters: int = 10_000
    """Of a text as it was sent."""


DEFAULT_LIMITS = Limits()


def refuse_fields(value: Mapping[str, object], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Refuse an object that lacks a required field or has one that is not known."""
    if not set(required) <= set(value) <= {*required, *optional}:
        raise CodecError(
            "wrong_type", f"the object has fields {reprlib.repr(sorted(value))}, it takes {[*required, *optional]}"
        )


def from_base64(text: str, pointer: str, limit: int | None = None) -> bytes:
    """Bytes of a base64 text, its length checked before it is decoded. ``codec`` documents what is tolerated."""
    if not text.isascii():
        raise CodecError("bad_base64", "not base64: it has characters outside ASCII", pointer)
    packed = text.encode().translate(_URL_SAFE, _WHITE_SPACE)
    body = packed.rstrip(b"=")
    size = len(body) * 3 // 4
    if limit is not None and size > limit:
        raise CodecError("too_large", f"base64 of {size} bytes, {limit} are allowed", pointer)
    try:
        if len(packed) - len(body) > 2:
            raise binascii.Error("more than two padding characters")
        return binascii.a2b_base64(body + b"=" * (-len(body) % 4), strict_mode=True)
    except binascii.Error as error:
        raise CodecError("bad_base64", f"not base64: {str(error).lower()}", pointer) from error


def to_base64(array: Shaped[np.ndarray, "..."]) -> str:
    """Little-endian float32 in row-major order."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def kind(value: object) -> str:
    """What JSON calls the value, for error texts."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
