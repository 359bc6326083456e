"""The codec's error, its size limits, and checks that all kinds of values share."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Code = Literal[
    "bad_base64",
    "bad_image",
    "bad_audio",
    "bad_text",
    "bad_vector",
    "bad_attributes",
    "bad_class",
    "unsupported_media_type",
    "too_large",
    "wrong_type",
]


class CodecError(ValueError):
    """A value that is not a valid row of its modality.

    Attributes:
        code: the kind of error, for programs.
        detail: what was received, what is allowed and what to do, for people.
        pointer: JSON pointer to the error, relative to the modality's value. Empty if the whole value is wrong.
    """

    def __init__(self, code: Code, detail: str, pointer: str = "") -> None:
        super().__init__(code, detail, pointer)  # pickle calls the constructor with these arguments
        self.code: Code = code
        self.detail = detail
        self.pointer = pointer

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class Limits:
    """Largest values that are accepted. Each is checked before the value is decoded, or as soon as it is known."""

    image_bytes: int = 10 << 20
    """Bytes of an image file, after base64 decoding."""
    image_pixels: int = 16_000_000
    """Width times height that an image file declares."""
    audio_bytes: int = 10 << 20
    """Bytes of an audio file, after base64 decoding."""
    audio_seconds: float = 60.0
    """Length of an audio file, in seconds."""
    audio_samples: int = 16_000_000
    """Samples of an audio file, in all channels together."""
    text_characters: int = 10_000
    """Characters of a text as received, before normalisation."""

    @property
    def file_bytes(self) -> int:
        """Bytes of a file of any kind."""
        return max(self.image_bytes, self.audio_bytes)


DEFAULT_LIMITS = Limits()


def check_fields(value: Mapping[str, object], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Check that a JSON object has every required field and no unknown field.

    Raises:
        CodecError: ``wrong_type``.
    """
    if not set(required) <= set(value) <= {*required, *optional}:
        raise CodecError(
            "wrong_type",
            f"the object has the fields {reprlib.repr(sorted(value))}; allowed are {[*required, *optional]}, "
            f"required are {[*required]}",
        )


def json_type(value: object) -> str:
    """JSON type of a value, with its article, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
