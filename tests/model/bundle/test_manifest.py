"""Manifests: the oldest format that describes a bundle, and what manifests of older formats mean."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.model.bundle import MANIFEST, builtin, read
from concord.model.bundle.manifest import GRAPH_VALUES, graph_input, oldest_format
from concord.model.modality import ImageModality, TextModality

WORDS: dict[str, Any] = {"name": "title", "kind": "text", "length": 4, "unit": "word", "vocabulary": ["a"]}


def format_of(*modalities: dict[str, Any]) -> int:
    return oldest_format({"modalities": modalities, "graphs": {"encode": "e", "refine": "r", "decode": {}}})


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 2),
        ({"segmentation": "letters"}, 2),
        ({"segmentation": "unicode"}, 4),
        ({"segmentation": "unicode", "unit": "character", "vocabulary": [], "alphabet": " a"}, 1),
        ({"segmentation": "unicode", "likelihood": "autoregressive"}, 6),
        ({"unit": "subword", "vocabulary": [], "merges": ["a b"], "likelihood": "autoregressive"}, 6),
        ({"unit": "character", "vocabulary": [], "alphabet": " a", "likelihood": "autoregressive"}, 6),
    ],
)
def test_oldest_format_depends_on_the_rule_for_words(fields: dict[str, Any], number: int) -> None:
    assert format_of({**WORDS, **fields}) == number


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 1),
        ({"components": 5}, 1),
        ({"channels": 2}, 2),
        ({"learned_scale": "modality"}, 7),
        ({"likelihood": "logistic_mixture"}, 7),
        ({"kind": "audio", "seconds": 1.0, "sample_rate": 8000, "mels": 24}, 5),
        ({"kind": "audio", "seconds": 1.0, "sample_rate": 8000, "mels": 24, "learned_scale": "modality"}, 7),
    ],
)
def test_oldest_format_depends_on_the_likelihood_of_an_image(fields: dict[str, Any], number: int) -> None:
    image = {} if "kind" in fields else {"kind": "image", "channels": 3, "height": 8, "width": 8}
    assert format_of({"name": "photo", **image, **fields}) == number


def test_manifest_of_an_image_names_only_what_older_versions_know() -> None:
    """They reject a field that they do not know."""
    image = ImageModality(name="photo", channels=3, height=8, width=8)
    assert set(image.model_dump()) == {
        "name",
        "weight",
        "kind",
        "channels",
        "height",
        "width",
        "likelihood",
        "scale",
        "background",
    }


@pytest.mark.parametrize(("names", "number"), [("abcdefgh", 1), ("abcdefghi", 4), (["noise", "a"], 4), (["z", "value"], 1)])
def test_oldest_format_depends_on_the_number_and_the_names_of_modalities(names: Sequence[str], number: int) -> None:
    assert format_of(*({"name": name, "kind": "vector", "size": 1} for name in names)) == number


def test_manifest_without_a_rule_for_words_means_the_older_rule() -> None:
    older = TextModality.model_validate(WORDS)
    assert older.segmentation == "letters"
    assert "segmentation" not in older.model_dump()
    newer = TextModality.model_validate({**WORDS, "segmentation": "unicode"})
    assert TextModality.model_validate_json(newer.model_dump_json()) == newer


def test_builtin_bundle_of_words_keeps_the_older_rule() -> None:
    folder: Path = builtin("birds")
    assert "segmentation" not in (folder / MANIFEST).read_text()
    (words,) = [m for m in read(folder).manifest.modalities if isinstance(m, TextModality)]
    assert (json.loads((folder / MANIFEST).read_text())["format"], words.segmentation) == (2, "letters")


@given(name=st.sampled_from(sorted(GRAPH_VALUES)) | st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True))
def test_graph_input_is_no_other_value_of_the_graphs_and_unique(name: str) -> None:
    assert graph_input(name) not in GRAPH_VALUES
    assert graph_input(name).removeprefix("input.") == name
