"""The built-in bundle ``birds``, trained on incomplete rows: size, published metrics, generated attributes."""

import json

import numpy as np
import pytest

from concord.model import bundle, codec
from concord.model.runtime import Runtime
from concord.training.reports.tables import rows_table
from tests.support.server import ROOT

RESULTS = ROOT / "training/results"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin("birds"), threads=1)


def test_birds_bundle_replays_golden_examples_and_is_small(runtime: Runtime) -> None:
    assert runtime.replay_golden() <= 1e-3
    assert sum(entry.bytes for entry in runtime.bundle.manifest.files.values()) <= 20e6


def test_birds_bundle_metrics_equal_published_results(runtime: Runtime) -> None:
    all_rows, complete_rows = (json.loads((RESULTS / "birds" / f"{name}.json").read_text()) for name in ("all", "complete"))
    metrics = runtime.bundle.manifest.metrics
    assert all(metrics[key] == all_rows[key] for key in ("attributes", "retrieval", "probe"))
    assert rows_table(all_rows, complete_rows) in (RESULTS / "birds.md").read_text(encoding="utf-8")
    from_photo = all_rows["attributes"]["attributes"]["photo"]
    assert from_photo["map"] > max(from_photo["chance"], complete_rows["attributes"]["attributes"]["photo"]["map"])


@pytest.mark.parametrize("colour", ["blue", "red", "yellow"])
def test_birds_bundle_caption_with_colour_gives_its_attribute(runtime: Runtime, colour: str) -> None:
    """The attribute of the named colour is more likely than its average over captions with three colours."""
    caption = next(m for m in runtime.modalities if m.name == "caption")
    attributes = next(m for m in runtime.modalities if m.name == "attributes")
    texts = [f"this bird has a {named} breast and a {named} belly" for named in ("blue", "red", "yellow")]
    rows = np.stack([codec.parse(caption, text) for text in texts])
    inputs = {m.name: rows if m is caption else np.zeros((3, *m.shape), m.dtype) for m in runtime.modalities}
    present = np.array([[m is caption for m in runtime.modalities]] * 3)
    probabilities = runtime.decode("attributes", runtime.encode(inputs, present).mean)
    column = probabilities[:, attributes.attributes.index(f"has_primary_color::{colour}")]
    assert column[texts.index(f"this bird has a {colour} breast and a {colour} belly")] > column.mean()
