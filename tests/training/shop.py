"""A small shop: photo, title, brand and measures of each article, of which 40 % are missing. Drawn here, with nulls and all."""

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
    """Colour shows in photo, title and brand; shape in photo, title and measures."""
    generator = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"photo": [], "title": [], "brand": [], "measures": []}
    for _ in range(articles):
        colour, shape = list(COLOURS)[generator.integers(3)], int(generator.integers(4))
        title = f"{generator.choice(['fine', 'plain', 'new'])} {colour} {SHAPES[shape]}"
        values = [photo(colour, shape), title, BRANDS[colour], (10 * shape + generator.normal(size=3)).tolist()]
        gone = generator.random(4) < missing
        gone[generator.integers(4)] &= not gone.all()
        for column, value, absent in zip(rows.values(), values, gone, strict=True):
            column.append(None if absent else value)
    datasets.Dataset.from_dict(rows).to_parquet(file)


def photo(colour: str, shape: int) -> bytes:
    """A PNG of 16 x 16."""
    pixels = np.full((16, 16, 3), 240, np.uint8)
    pixels[3 : 13 - 2 * shape, 3 : 5 + 3 * shape] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    write_shop(Path(sys.argv[1]))
