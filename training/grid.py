"""What a model makes of each subset, as one picture: what it is given beside what comes out."""

from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model import codec
from model.modality import ImageModality, Modality, TextModality
from model.vae.generative import Generative
from training.data import Batch
from training.objectives import named_subsets
from training.posteriors import posteriors

TILE, GAP, MARGIN, BLOCK = 36, 2, 96, 10  # pixels
GIVEN = (230, 120, 20)


def draw_grid(model: Generative, batch: Batch) -> Image.Image:
    """A block for every subset but the whole one, named on the left; a column for every row of the batch, a line for every
    image and text: framed where it was given, else decoded from one sample of the posterior at temperature 1."""
    shown = [m for m in model.modalities if isinstance(m, ImageModality | TextModality)]
    *sources, _ = named_subsets([m.name for m in model.modalities]).items()
    rows, step = len(batch.present), TILE + GAP
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
                    tile = _tile(modality, (given if here else made)[column].numpy())
                    left, upper = MARGIN + column * step, top + line * step
                    canvas.paste(tile, (left, upper))
                    if here:
                        pen.rectangle((left, upper, left + TILE - 1, upper + TILE - 1), outline=GIVEN, width=2)
    return canvas


def _as_decoded(modality: Modality, values: Tensor) -> Tensor:
    """Data in the shape of what a decoder expects: tokens become certainties."""
    if isinstance(modality, TextModality):
        return torch.nn.functional.one_hot(values, modality.categories).float()
    return values


def _tile(modality: Modality, value: np.ndarray) -> Image.Image:
    if isinstance(modality, TextModality):
        tile = Image.new("RGB", (TILE, TILE), (245, 245, 245))
        text = cast(str, codec.encode(modality, value.astype(np.float32))["text"])
        ImageDraw.Draw(tile).text(
            (TILE / 2, TILE / 2), text[:12], fill="black", font=ImageFont.load_default(size=9), anchor="mm"
        )
        return tile
    pixels = np.rint(value.clip(0, 1) * 255).astype(np.uint8)[:3]
    mode = np.repeat(pixels[:1], 3, axis=0) if len(pixels) < 3 else pixels
    return Image.fromarray(mode.transpose(1, 2, 0)).resize((TILE, TILE), Image.Resampling.BICUBIC)
