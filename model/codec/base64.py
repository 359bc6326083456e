"""Base64 of bytes and of float32 arrays."""

import base64
import binascii
import contextlib

import numpy as np
from jaxtyping import Shaped

from concord.model.codec.errors import CodecError

_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\n\r\x0b\x0c"


def from_base64(text: str, pointer: str, limit: int | None = None) -> bytes:
    """Bytes of a base64 text.

    Both alphabets (standard and URL-safe), missing padding and ASCII white space are accepted.

    Args:
        pointer: JSON pointer of the text, for the error.
        limit: largest number of decoded bytes. It is checked before decoding.

    Raises:
        CodecError: ``bad_base64`` or ``too_large``.
    """
    if limit is None or len(text) <= limit:
        with contextlib.suppress(ValueError):  # most texts need nothing that follows, which takes as long as the decoding
            return binascii.a2b_base64(text, strict_mode=True)
    if not text.isascii():
        raise CodecError("bad_base64", "not base64: it has characters outside ASCII", pointer)
    packed = text.encode().translate(_URL_SAFE_TO_STANDARD, _WHITE_SPACE)
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


def bytes_to_base64(content: bytes) -> str:
    """Base64 of bytes: standard alphabet, with padding."""
    return base64.b64encode(content).decode()


def array_to_base64(array: Shaped[np.ndarray, "..."]) -> str:
    """Base64 of an array's values as little-endian float32 in row-major order."""
    return bytes_to_base64(np.ascontiguousarray(array, dtype="<f4").tobytes())
