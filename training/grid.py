"""What a model makes of each subset, as one picture: what it is given beside what comes out."""

import textwrap
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model import codec
from model.modality import ImageModality, Modality, TextModality
from model.vae.generative import Generative
from training.data import Batch, Dataset
from training.objectives import named_subsets
from training.posteriors import posteriors

GAP, MARGIN, BLOCK, LINE, LETTER = 2, 96, 10, 10, 5  # pixels
ROWS, LOOKED_THROUGH = 6, 500
GIVEN = (230, 120, 20)


def examples(test: Dataset) -> Batch:
    """``ROWS`` rows drawn at random, of those with the most modalities."""
    batch = next(test.batches(0, min(LOOKED_THROUGH, len(test)), 0, shuffle=True))
    chosen = torch.argsort(-batch.present.sum(1), stable=True)[:ROWS]
    arrays = {name: array[chosen] for name, array in batch.arrays.items()}
    return Batch(arrays, batch.present[chosen], None if batch.labels is None else batch.labels[chosen])


def draw_grid(model: Generative, batch: Batch) -> Image.Image:
    """A block for every subset but the whole one, named on the left; a column for every row of the batch, a line for every
    image and text: framed where it was given, else decoded from one sample of the posterior at temperature 1."""
    shown = [m for m in model.modalities if isinstance(m, ImageModality | TextModality)]
    *sources, _ = named_subsets([m.name for m in model.modalities]).items()
    side = 72 if any(max(m.shape[1:]) > 40 for m in shown if isinstance(m, ImageModality)) else 36
    rows, step = len(batch.present), side + GAP
    height = len(sources) * (len(shown) * step + BLOCK)
    canvas = Image.new("RGB", (MARGIN + rows * step, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    generator = torch.Generator().manual_seed(0)
    masks = [batch.present & mask for _, mask in sources]
    with torch.no_grad():
        found = posteriors(model, batch.arrays, masks)
        for block, ((source, _), seen, q) in enumerate(zip(sources, masks, found, strict=True)):
            top = block * (len(shown) * step + BLOCK)
            pen.multiline_text((2, top + 4), "from\n" + source.replace("+", "\nand "), fill="black", font=font)
            z = q.sample(1, generator)[:, 0]
            for line, modality in enumerate(shown):
                index = model.modalities.index(modality)
                made, given = model.decode(modality.name, z), _as_decoded(modality, batch.arrays[modality.name])
                for column in range(rows):
                    here = bool(seen[column, index])
                    tile = _tile(modality, (given if here else made)[column].numpy(), side)
                    left, upper = MARGIN + column * step, top + line * step
                    canvas.paste(tile, (left, upper))
                    if here:
                        pen.rectangle((left, upper, left + side - 1, upper + side - 1), outline=GIVEN, width=2)
    return canvas


def _as_decoded(modality: Modality, values: Tensor) -> Tensor:
    """Data in the shape of what a decoder expects: tokens become certainties."""
    if isinstance(modality, TextModality):
        return torch.nn.functional.one_hot(values, modality.categories).float()
    return values


def _tile(modality: Modality, value: np.ndarray, side: int) -> Image.Image:
    if isinstance(modality, TextModality):
        tile = Image.new("RGB", (side, side), (245, 245, 245))
        text = cast(str, codec.encode(modality, value.astype(np.float32))["text"])
        told = textwrap.fill(text, side // LETTER, max_lines=side // LINE, placeholder=" …")
        ImageDraw.Draw(tile).multiline_text(
            (side / 2, side / 2),
            told,
            fill="black",
            font=ImageFont.load_default(size=9),
            anchor="mm",
            align="center",
            spacing=1,
        )
        return tile
    pixels = np.rint(value.clip(0, 1) * 255).astype(np.uint8)[:3]
    mode = np.repeat(pixels[:1], 3, axis=0) if len(pixels) < 3 else pixels
    return Image.fromarray(mode.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
