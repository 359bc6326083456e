"""What the codec refuses: the limits, and the error that says why."""

from dataclasses import dataclass
from typing import Literal

Code = Literal[
    "bad_base64", "bad_image", "bad_text", "bad_vector", "bad_attributes", "unsupported_media_type", "too_large", "wrong_type"
]


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
