"""A generated catalogue of a small shop: photo, title, brand and measures of each article. 40% of the values are missing."""

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 40, 210)}
BRANDS = dict(zip(COLOURS, ("acme", "none", "zenith"), strict=True))
SHAPES = ("cup", "plate", "lamp", "chair")


def write_shop(file: Path, articles: int = 160, missing: float = 0.4) -> None:
    """Write the catalogue as a Parquet file.

    Photo, title and brand depend on the colour. Photo, title and measures depend on the shape. Every article has at least one
    value.

    Args:
        missing: share of missing values, written as null.
    """
    generator = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"photo": [], "title": [], "brand": [], "measures": []}
    for _ in range(articles):
        colour, shape = list(COLOURS)[generator.integers(3)], int(generator.integers(4))
        title = f"{generator.choice(['fine', 'plain', 'new'])} {colour} {SHAPES[shape]}"
        values = [photo(colour, shape), title, BRANDS[colour], (10 * shape + generator.normal(size=3)).tolist()]
        absent = generator.random(4) < missing
        absent[generator.integers(4)] &= not absent.all()
        for column, value, is_absent in zip(rows.values(), values, absent, strict=True):
            column.append(None if is_absent else value)
    datasets.Dataset.from_dict(rows).to_parquet(file)


def photo(colour: str, shape: int) -> bytes:
    """Return a PNG file of 16 x 16 pixels."""
    pixels = np.full((16, 16, 3), 240, np.uint8)
    pixels[3 : 13 - 2 * shape, 3 : 5 + 3 * shape] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    write_shop(Path(sys.argv[1]))
