"""What the bundle of partial rows promises of itself, asked of the bundle itself."""

import json

import numpy as np
import pytest

from model import bundle, codec
from model.runtime import Runtime
from tests.readme import README
from training.report import rows_table

RESULTS = README.parent / "training/results/birds"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin("birds"), threads=1)


def test_it_answers_as_it_was_exported(runtime: Runtime) -> None:
    assert runtime.replay_golden() <= 1e-3
    assert sum(entry.bytes for entry in runtime.bundle.manifest.files.values()) <= 20e6


def test_its_figures_are_those_published(runtime: Runtime) -> None:
    every, complete = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("all", "complete"))
    carried = runtime.bundle.manifest.metrics
    assert all(carried[key] == every[key] for key in ("attributes", "retrieval", "probe"))
    assert rows_table(every, complete) in README.read_text(encoding="utf-8")
    told = every["attributes"]["attributes"]["photo"]
    assert told["map"] > max(told["chance"], complete["attributes"]["attributes"]["photo"]["map"])


@pytest.mark.parametrize("colour", ["blue", "red", "yellow"])
def test_a_caption_tells_its_colour(runtime: Runtime, colour: str) -> None:
    """The colour named is likelier than it is on average over the three."""
    caption = next(m for m in runtime.modalities if m.name == "caption")
    attributes = next(m for m in runtime.modalities if m.name == "attributes")
    texts = [f"this bird has a {named} breast and a {named} belly" for named in ("blue", "red", "yellow")]
    rows = np.stack([codec.decode(caption, text) for text in texts])
    inputs = {m.name: rows if m is caption else np.zeros((3, *m.shape), m.dtype) for m in runtime.modalities}
    present = np.array([[m is caption for m in runtime.modalities]] * 3)
    told = runtime.decode("attributes", runtime.encode(inputs, present).mean)
    column = told[:, attributes.attributes.index(f"has_primary_color::{colour}")]
    assert column[texts.index(f"this bird has a {colour} breast and a {colour} belly")] > column.mean()
