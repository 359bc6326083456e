"""Image files, and their form in JSON."""

import base64
import io

import numpy as np
from PIL import Image


def encode_image(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """Return the image as a file. ``options`` are Pillow's."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise_image(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB", image_format: str = "PNG") -> bytes:
    """Return a file of uniform noise.

    Args:
        size: (width, height) in pixels.
        mode: RGB, or L for grey.
    """
    channels = {"RGB": (3,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return encode_image(Image.fromarray(pixels), image_format)


def to_base64(content: bytes) -> str:
    """Return the file as a JSON body holds it."""
    return base64.b64encode(content).decode()
