"""Demo data: example inputs that are valid in a request, and a plane through the latent space."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from concord.model import bundle, codec
from concord.model.modality import VectorModality, check_array
from concord.model.runtime import Runtime
from concord.service.page import demo_data


def describe(opened: bundle.Bundle) -> dict[str, Any]:
    return json.loads(demo_data.describe(opened))


def test_samples_equal_the_golden_inputs(runtime: Runtime) -> None:
    rows = describe(runtime.bundle)["samples"]
    with np.load(runtime.bundle.path / bundle.GOLDEN) as golden:
        assert len(rows) == min(len(golden["present"]), demo_data.MAX_EXAMPLES)
        for number, row in enumerate(rows):
            assert set(row) == {m.name for m in runtime.modalities}
            for modality in runtime.modalities:
                array = codec.parse(modality, row[modality.name])
                given = golden[f"input.{modality.name}"][number]
                if modality.kind == "text":  # padding may be in another place
                    array, given = array[array > 0], given[given > 0]
                np.testing.assert_allclose(array, given, atol=0.5 / 255)


def test_samples_of_every_kind_are_valid_in_a_request(tiny_bundle: bundle.Bundle) -> None:
    for row in describe(tiny_bundle)["samples"]:
        for modality in tiny_bundle.manifest.modalities:
            if row[modality.name] != "":  # a text that is all padding
                check_array(modality, codec.parse(modality, row[modality.name]))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
@example([2012.0, 0.1, 1.7e9])
def test_numbers_of_samples_have_no_digits_of_float32_rounding(numbers: list[float]) -> None:
    modality = VectorModality(name="numbers", size=3)
    row = demo_data.as_input(modality, np.array(numbers, np.float32))
    assert np.array_equal(np.float32(row), np.float32(numbers))
    assert [float(str(np.float32(number))) for number in row] == row


def test_map_of_bundle_without_reference_embeddings_shows_golden_examples(tiny_bundle: bundle.Bundle) -> None:
    latent_map = describe(tiny_bundle)["map"]
    assert latent_map["labels"] is None
    assert np.array(latent_map["points"]).shape == (15, 2)


def test_map_of_bundle_with_labels_separates_them(tiny_bundle: bundle.Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.array(["left", "right", "up"])[rng.integers(3, size=60)]
    mean = rng.normal(size=(60, 6)).astype(np.float32)
    mean[label == "left", 2] += 9
    mean[label == "up", 4] += 9
    latent_map = describe(copy_with_map(tiny_bundle, tmp_path / "tiny", mean=mean, label=label))["map"]
    assert latent_map["labels"] == label.tolist()
    plane, centre = np.array(latent_map["plane"]), np.array(latent_map["centre"])
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(latent_map["points"], (mean - centre) @ plane.T, atol=1e-3)
    assert np.linalg.norm(plane[:, [2, 4]]) ** 2 > 1.8, "the plane separates the labels"


@pytest.mark.parametrize(("rows", "latent"), [(1, 3), (2, 1), (5, 2), (40, 1)])
def test_find_plane_with_few_rows_or_dimensions_is_finite(rows: int, latent: int) -> None:
    mean = np.random.default_rng(0).normal(size=(rows, latent)).astype(np.float32)
    for label in (None, np.array(["a", "b", "c", "d"])[np.arange(rows) % 4]):
        plane = demo_data.find_plane(mean, label)
        assert plane.shape == (2, latent)
        assert np.isfinite(plane).all()


def copy_with_map(original: bundle.Bundle, path: Path, **arrays: Any) -> bundle.Bundle:
    """A copy of the bundle with these reference embeddings."""
    shutil.copytree(original.path, path)
    np.savez_compressed(path / bundle.MAP, **arrays)
    content = (path / bundle.MAP).read_bytes()
    manifest = json.loads((path / bundle.MANIFEST).read_bytes())
    manifest["files"][bundle.MAP] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / bundle.MANIFEST).write_text(json.dumps(manifest))
    return bundle.read(path)
