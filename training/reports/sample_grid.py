"""An image of what a model generates from each subset of modalities: given and generated values side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from concord.model import codec
from concord.model.modality import AudioModality, EncodedModality, ImageModality, Modality, TextModality, is_picture
from concord.training.data.dataset import Batch, Dataset
from concord.training.objectives import named_subsets
from concord.training.trainable import TrainableModel

MAX_HEIGHT = 2000
"""Of the image, in pixels. It has as many subsets as fit."""
_MAX_NAMED = 4
"""Modalities whose names fit next to a block. Larger subsets are named by what they lack."""
GAP, MARGIN, BLOCK_GAP, PADDING = 2, 96, 10, 3
"""Layout in pixels."""
SENTENCE_WIDTH = 132
"""Width of a column in pixels if a modality holds sentences."""
ROWS = 6
"""Columns of the grid."""
CANDIDATE_ROWS = 500
"""Random test rows from which the rows with the most modalities are selected."""
FRAME_COLOUR = (230, 120, 20)


class Gallery(NamedTuple):
    """Test pictures of a modality with a frozen encoder, with their features."""

    features: Float32[np.ndarray, "row feature"]
    pictures: UInt8[np.ndarray, "row 3 height width"]

    def nearest(self, features: Float32[np.ndarray, " feature"]) -> Float32[np.ndarray, "3 height width"]:
        """Return the picture whose features are most similar, by their cosine."""
        norms = np.linalg.norm(self.features, axis=1)
        place = np.argmax(self.features @ features / np.maximum(norms, 1e-12))
        return np.asarray(self.pictures[place] / np.float32(255))


def select_examples(test: Dataset) -> tuple[Batch, dict[str, Gallery]]:
    """Return ``ROWS`` of the rows with the most modalities among ``CANDIDATE_ROWS`` random test rows.

    Modalities with a frozen encoder of pictures also have a gallery: the pictures of all these candidates.
    """
    count = min(CANDIDATE_ROWS, len(test))
    batch = next(test.batches(0, count, 0, shuffle=True))
    galleries = {}
    for index, modality in enumerate(test.modalities):
        if isinstance(modality, EncodedModality) and is_picture(modality):
            rows = test.first_shuffled(count)[batch.present[:, index].cpu().numpy()]
            if found := test.pictures(modality.name, rows, _side(test.modalities)):
                galleries[modality.name] = Gallery(*found)
    return batch.take(torch.argsort(-batch.present.sum(1), stable=True)[:ROWS]), galleries


def render_grid(model: TrainableModel, batch: Batch, galleries: Mapping[str, Gallery] | None = None) -> Image.Image:
    """Return an image with one block per subset of modalities, except the full one. With many subsets, it shows some of them.

    A block has one column per row of the batch and one line per image or text modality. Given values have a frame. The others
    are decoded from one sample of the posterior. The subset is named on the left.

    Args:
        galleries: pictures by modality with a frozen encoder, whose values are features. The grid shows the picture with the
            most similar features: of a given value it is the picture itself. Without a gallery the tiles are empty.
    """
    shown, side, width = _shown_modalities(model.modalities), _side(model.modalities), _width(model.modalities)
    subsets = list(_shown_subsets(model.modalities).values())
    rows, block_height = len(batch.present), _block_height(model.modalities)
    canvas = Image.new("RGB", (MARGIN + rows * (width + GAP), len(subsets) * block_height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    generator = torch.Generator().manual_seed(0)
    masks = [batch.present & subset for subset in subsets]
    with torch.no_grad():
        posteriors = model.posteriors(batch.arrays, masks)
        for block, (subset, present, q) in enumerate(zip(subsets, masks, posteriors, strict=True)):
            top = block * block_height
            pen.multiline_text((2, top + 4), _label(model.modalities, subset), fill="black", font=font)
            z = q.sample(1, generator)[:, 0]
            for line, modality in enumerate(shown):
                index = model.modalities.index(modality)
                generated, given = model.decode(modality.name, z), _as_decoded(modality, batch.arrays[modality.name])
                for column in range(rows):
                    is_given = bool(present[column, index])
                    value = (given if is_given else generated)[column].numpy()
                    tile = _tile(modality, value, side, width, (galleries or {}).get(modality.name))
                    left = MARGIN + column * (width + GAP) + (width - tile.width) // 2
                    upper = top + line * (side + GAP)
                    canvas.paste(tile, (left, upper))
                    if is_given:
                        pen.rectangle((left, upper, left + tile.width - 1, upper + side - 1), outline=FRAME_COLOUR, width=2)
    return canvas


def _label(modalities: Sequence[Modality], mask: Bool[Tensor, " modality"]) -> str:
    """Return the name of a subset, on several lines."""
    given = [m.name for m, bit in zip(modalities, mask.tolist(), strict=True) if bit]
    missing = [m.name for m in modalities if m.name not in given]
    is_long = len(given) > max(_MAX_NAMED, len(missing))
    return f"from {'all but' if is_long else ''}".rstrip() + "\n" + "\nand ".join(missing if is_long else given)


def grid_caption(modalities: Sequence[Modality]) -> str:
    """Return what an image of ``render_grid`` shows."""
    shown, count = len(_shown_subsets(modalities)), 2 ** len(modalities) - 2
    if shown == count:
        return "One sample of the posterior of each subset, next to its inputs"
    return (
        f"One sample of the posterior of {shown} of the {count} subsets, next to its inputs (single modalities first, then all "
        "but one, then pairs, and so on)"
    )


def _shown_subsets(modalities: Sequence[Modality]) -> dict[str, Bool[Tensor, " modality"]]:
    """Return the subsets of an image by name: all but the full one if their blocks fit into ``MAX_HEIGHT``.

    Otherwise the first of this list that fit: single modalities, all but one, pairs, all but two, and so on.
    """
    *subsets, _ = named_subsets([m.name for m in modalities]).items()
    if (limit := max(1, MAX_HEIGHT // _block_height(modalities))) >= len(subsets):
        return dict(subsets)

    def priority(item: tuple[str, Bool[Tensor, " modality"]]) -> tuple[int, int, list[bool]]:
        mask = item[1]
        size, is_large = int(mask.sum()), 2 * int(mask.sum()) > len(mask)
        listed = mask if is_large else ~mask  # the absent modalities of a large subset, in the order of single modalities
        return (len(mask) - size if is_large else size, size, listed.tolist())

    chosen = {name for name, _ in sorted(subsets, key=priority)[:limit]}
    return {name: mask for name, mask in subsets if name in chosen}


def _shown_modalities(modalities: Sequence[Modality]) -> list[Modality]:
    return [m for m in modalities if isinstance(m, ImageModality | AudioModality | TextModality) or is_picture(m)]


def _side(modalities: Sequence[Modality]) -> int:
    """Return height and width of a picture."""
    sizes = [max(m.shape[1:]) for m in modalities if isinstance(m, ImageModality | AudioModality)]
    is_large = max(sizes, default=0) > 40 or any(isinstance(m, EncodedModality) and is_picture(m) for m in modalities)
    return 72 if is_large or _has_sentences(modalities) else 36


def _width(modalities: Sequence[Modality]) -> int:
    """Return the width of a column."""
    return SENTENCE_WIDTH if _has_sentences(modalities) else _side(modalities)


def _has_sentences(modalities: Sequence[Modality]) -> bool:
    return any(isinstance(m, TextModality) and m.likelihood == "autoregressive" for m in modalities)


def _block_height(modalities: Sequence[Modality]) -> int:
    return len(_shown_modalities(modalities)) * (_side(modalities) + GAP) + BLOCK_GAP


def _as_decoded(modality: Modality, values: Tensor) -> Tensor:
    """Return data as a decoder returns it: tokens become one-hot vectors unless the decoder returns tokens."""
    if isinstance(modality, TextModality) and modality.likelihood != "autoregressive":
        return torch.nn.functional.one_hot(values, modality.categories).float()
    return values


def _tile(modality: Modality, value: np.ndarray, side: int, width: int, gallery: Gallery | None) -> Image.Image:
    if isinstance(modality, TextModality):
        return _text_tile(cast(str, codec.render(modality, value)["text"]), side, width)
    if isinstance(modality, EncodedModality):
        if gallery is None:
            return Image.new("RGB", (side, side), "white")
        value = gallery.nearest(value)
    if isinstance(modality, AudioModality):
        value = value[:, ::-1]  # low frequencies at the bottom
    pixels = np.rint(value.clip(0, 1) * 255).astype(np.uint8)[:3]
    rgb = np.repeat(pixels[:1], 3, axis=0) if len(pixels) < 3 else pixels
    return Image.fromarray(rgb.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)


def _text_tile(text: str, side: int, width: int) -> Image.Image:
    """Return an image of a text. What does not fit is cut."""
    size = 11 if width > side else 9
    font, lines, most = ImageFont.load_default(size=size), [""], side // (size + 2)
    tile = Image.new("RGB", (width, side), (245, 245, 245))
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 2 * PADDING or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    ImageDraw.Draw(tile).multiline_text(
        (width / 2, side / 2), "\n".join(lines), fill="black", font=font, anchor="mm", align="center", spacing=1
    )
    return tile
