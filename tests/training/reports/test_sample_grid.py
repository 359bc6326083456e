"""The image of samples: every subset if they fit, else a choice of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concord.model.modality import CategoricalModality, EncodedModality, ImageModality, Modality, TextModality, VectorModality
from concord.training.data.dataset import Batch
from concord.training.reports import sample_grid
from concord.training.reports.sample_grid import MAX_HEIGHT, Gallery, grid_caption, render_grid


def modalities(kinds: str, side: int = 8) -> list[Modality]:
    """Return a modality for each letter: i(mage), e(ncoded image), t(ext), s(entence), c(ategorical), v(ector)."""
    make: dict[str, Callable[[str], Modality]] = {
        "i": lambda name: ImageModality(name=name, channels=3, height=side, width=side),
        "e": lambda name: EncodedModality(name=name, kind="image", encoder="photos", size=2, mean=(0.0, 0.0), std=(1.0, 1.0)),
        "t": lambda name: TextModality(name=name, length=3, alphabet=" ab"),
        "s": lambda name: TextModality(name=name, length=3, alphabet=" ab", likelihood="autoregressive"),
        "c": lambda name: CategoricalModality(name=name, classes=("a", "b")),
        "v": lambda name: VectorModality(name=name, size=2, mean=(0.0, 0.0), std=(1.0, 1.0)),
    }
    return [make[kind](f"{kind}{number}") for number, kind in enumerate(kinds)]


def batch_of(chosen: list[Modality], make_rows: Any) -> Batch:
    return Batch(make_rows(chosen, sample_grid.ROWS), torch.ones(sample_grid.ROWS, len(chosen), dtype=torch.bool), None)


@pytest.mark.parametrize(
    ("kinds", "side"), [("ittccccc", 80), ("iiiiiiii", 64), ("tcv", 8), ("cv", 8), ("it", 8), ("is", 8), ("iiit", 8), ("es", 8)]
)
def test_grid_is_at_most_2000_pixels_high(make_vae: Any, make_rows: Any, kinds: str, side: int) -> None:
    chosen = modalities(kinds, side)
    image = render_grid(make_vae(chosen), batch_of(chosen, make_rows))
    assert 0 < image.height <= MAX_HEIGHT == 2000


def test_encoded_picture_shows_the_picture_with_the_most_similar_features(make_vae: Any, make_rows: Any) -> None:
    """Each picture of the gallery has a colour. The given features are those of one of them, up to their length."""
    chosen = modalities("es")
    batch = batch_of(chosen, make_rows)
    directions = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], np.float32)
    batch.arrays["e0"][:] = 3 * torch.from_numpy(directions[[0, 1, 2, 2, 1, 0]])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    pictures = np.broadcast_to(colours[:, :, None, None], (3, 3, 72, 72))
    image = render_grid(make_vae(chosen), batch, {"e0": Gallery(directions, pictures)})
    width = sample_grid.SENTENCE_WIDTH + sample_grid.GAP
    pixels = [image.getpixel((sample_grid.MARGIN + column * width + width // 2, 36)) for column in range(6)]
    assert pixels == [tuple(colours[index]) for index in (0, 1, 2, 2, 1, 0)]
    generated = image.getpixel((sample_grid.MARGIN + width // 2, 36 + sample_grid._block_height(chosen)))
    assert generated in {tuple(colour) for colour in colours.tolist()}


def test_text_tile_cuts_a_text_that_does_not_fit() -> None:
    """Only what is cut has other pixels."""
    short, long, longer = (
        np.asarray(sample_grid._text_tile(" ".join(["word"] * count), 72, 132)).tobytes() for count in (8, 200, 300)
    )
    assert short != long == longer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("10000000", "from\ni0"),
        ("11110000", "from\ni0\nand t1\nand c2\nand c3"),
        ("11111110", "from all but\nc7"),
        ("11111000", "from all but\nc5\nand c6\nand c7"),
    ],
)
def test_large_subset_is_named_by_what_it_lacks(given: str, expected: str) -> None:
    assert sample_grid._label(modalities("itcccccc"), torch.tensor([bit == "1" for bit in given])) == expected


@given(st.text("itecvs", min_size=2, max_size=8), st.sampled_from([8, 64]))
def test_grid_shows_every_subset_or_the_single_ones_first(kinds: str, side: int) -> None:
    chosen = modalities(kinds, side)
    names, shown = [m.name for m in chosen], list(sample_grid._shown_subsets(chosen))
    count = 2 ** len(chosen) - 2
    assert len(set(shown)) == len(shown) <= count
    assert "+".join(names) not in shown
    sizes = [name.count("+") + 1 for name in shown]
    assert sizes == sorted(sizes)
    if len(shown) == count:
        assert grid_caption(chosen) == "One sample of the posterior of each subset, next to its inputs"
        return
    assert grid_caption(chosen).startswith(f"One sample of the posterior of {len(shown)} of the {count} subsets")
    assert (len(shown) + 1) * sample_grid._block_height(chosen) > MAX_HEIGHT, "there is no space for another one"
    assert names[: len(shown)] == shown[: len(names)]
    all_but_one = [set(names) - set(subset.split("+")) for subset in shown if subset.count("+") == len(names) - 2]
    assert set().union(*all_but_one) == set(names[: len(all_but_one)]), "they lack the first modalities"
