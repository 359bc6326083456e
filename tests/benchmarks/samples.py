"""What is asked for: photographs of the bundle's golden examples as PNG files, and words."""

import base64
import functools
import io

import numpy as np

from model import bundle
from model.image import file_from_array

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT = 16


@functools.cache
def pictures() -> tuple[dict[str, str], ...]:
    """Items of one photograph each."""
    opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
    with np.load(io.BytesIO(opened.content(bundle.GOLDEN)), allow_pickle=False) as golden:
        photos = golden["input.photo"]
    files = [file_from_array(photos[number % len(photos)], "png") for number in range(COUNT)]
    return tuple({"photo": base64.b64encode(file).decode()} for file in files)


def words() -> tuple[dict[str, str], ...]:
    """Items of one word each."""
    return tuple({"word": word} for word in WORDS)
