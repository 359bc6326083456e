"""Items of the requests: photos of the bundle's golden examples as PNG files, and words."""

import base64
import functools
import io

import numpy as np

from concord.model import bundle
from concord.model.codec.image import file_from_array

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHOTO_COUNT = 16


@functools.cache
def photo_items() -> tuple[dict[str, str], ...]:
    """Return items of one photo each: 32 x 32 RGB, PNG, base64."""
    opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
    with np.load(io.BytesIO(opened.content(bundle.GOLDEN)), allow_pickle=False) as golden:
        photos = golden["input.photo"]
    files = [file_from_array(photos[number % len(photos)], "png") for number in range(PHOTO_COUNT)]
    return tuple({"photo": base64.b64encode(file).decode()} for file in files)


def word_items() -> tuple[dict[str, str], ...]:
    """Return items of one word each."""
    return tuple({"word": word} for word in WORDS)
