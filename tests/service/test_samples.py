"""Samples that a call takes as they are, and a plane in which Gaussians keep their shape."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import bundle, codec
from model.modality import check_array
from model.runtime import Runtime
from service import samples


def told(found: bundle.Bundle) -> dict[str, Any]:
    return json.loads(samples.describe(found))


def test_samples_are_the_golden_inputs(runtime: Runtime) -> None:
    rows = told(runtime.bundle)["samples"]
    with np.load(runtime.bundle.path / bundle.GOLDEN) as golden:
        assert len(rows) == min(len(golden["present"]), samples.MOST_SAMPLES)
        for number, row in enumerate(rows):
            assert set(row) == {m.name for m in runtime.modalities}
            for modality in runtime.modalities:
                array = codec.decode(modality, row[modality.name])
                given = golden[f"input.{modality.name}"][number]
                if modality.kind == "text":  # which may have stood elsewhere in its field
                    array, given = array[array > 0], given[given > 0]
                np.testing.assert_allclose(array, given, atol=0.5 / 255)


def test_samples_of_every_kind_are_values_that_a_call_takes(tiny_bundle: bundle.Bundle) -> None:
    for row in told(tiny_bundle)["samples"]:
        for modality in tiny_bundle.manifest.modalities:
            if row[modality.name] != "":  # a text of nothing but padding
                check_array(modality, codec.decode(modality, row[modality.name]))


def test_a_bundle_without_a_map_shows_its_golden_examples(tiny_bundle: bundle.Bundle) -> None:
    shown = told(tiny_bundle)["map"]
    assert shown["labels"] is None
    assert np.array(shown["points"]).shape == (15, 2)


def test_the_map_of_a_bundle_is_its_own(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.array(["left", "right", "up"])[rng.integers(3, size=60)]
    mean = rng.normal(size=(60, 6)).astype(np.float32)
    mean[label == "left", 2] += 9
    mean[label == "up", 4] += 9
    shown = told(add(tiny_bundle, tmp_path / "tiny", mean=mean, label=label))["map"]
    assert shown["labels"] == label.tolist()
    plane, centre = np.array(shown["plane"]), np.array(shown["centre"])
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(shown["points"], (mean - centre) @ plane.T, atol=1e-3)
    assert np.linalg.norm(plane[:, [2, 4]]) ** 2 > 1.8, "the plane is that in which the labels part"


@pytest.mark.parametrize(("rows", "latent"), [(1, 3), (2, 1), (5, 2), (40, 1)])
def test_there_is_a_plane_through_anything(rows: int, latent: int) -> None:
    mean = np.random.default_rng(0).normal(size=(rows, latent)).astype(np.float32)
    for label in (None, np.array(["a", "b", "c", "d"])[np.arange(rows) % 4]):
        plane = samples.find_plane(mean, label)
        assert plane.shape == (2, latent)
        assert np.isfinite(plane).all()


def add(found: bundle.Bundle, path: Path, **arrays: Any) -> bundle.Bundle:
    """A copy of the bundle with this map."""
    shutil.copytree(found.path, path)
    np.savez_compressed(path / bundle.MAP, **arrays)
    content = (path / bundle.MAP).read_bytes()
    manifest = json.loads((path / bundle.MANIFEST).read_bytes())
    manifest["files"][bundle.MAP] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / bundle.MANIFEST).write_text(json.dumps(manifest))
    return bundle.read(path)
