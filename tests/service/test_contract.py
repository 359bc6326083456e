"""The document for kinds of modality that the built-in bundle lacks."""

import copy
from typing import Any

import jsonschema
import pytest

from model.modality import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from model.runtime import Runtime
from service.app import create
from service.contract import document
from service.settings import Settings

MODALITIES = (
    VectorModality(name="sensor", size=3),
    BinaryModality(name="face", attributes=("smile", "hat")),
    TextModality(name="word", length=5, alphabet=" abc"),
    TextModality(name="title", length=3, unit="word", vocabulary=("blue", "cup")),
    CategoricalModality(name="brand", classes=("acme", "zenith")),
    ImageModality(name="scan", channels=2, height=2, width=2),
)


@pytest.fixture(scope="module")
def described(runtime: Runtime) -> dict[str, Any]:
    return document(create([runtime], Settings()), MODALITIES, Settings(max_items=4))


def requests(described: dict[str, Any], path: str) -> dict[str, Any]:
    content: dict[str, Any] = described["paths"][path]["post"]["requestBody"]["content"]
    return content


@pytest.mark.parametrize(
    ("item", "valid"),
    [
        ({"sensor": [1, 2, 3]}, True),
        ({"sensor": [1, 2]}, False),
        ({"sensor": {"data": "AAAA", "dtype": "float32"}}, True),
        ({"sensor": {"data": "AAAA"}}, False),
        ({"title": "any words, known or not"}, True),
        ({"title": ""}, False),
        ({"brand": "acme"}, True),
        ({"brand": "Acme"}, False),
        ({"scan": {"data": "AAAA", "shape": [2, 2, 2], "dtype": "float32"}}, True),
        ({"scan": {"data": "AAAA", "shape": [2, 2, 3], "dtype": "float32"}}, False),
        ({"scan": "AAAA"}, False),
        ({"face": [0, True]}, True),
        ({"face": {"smile": True, "hat": 0}}, True),
        ({"face": {"smile": True}}, False),
        ({"word": "abc", "face": None, "id": "x"}, True),
        ({"word": None}, False),
        ({"id": "x"}, False),
        ({"photo": "x", "word": "abc"}, False),
    ],
)
def test_an_item_is_described_by_the_bundles_modalities(described: dict[str, Any], item: dict[str, Any], valid: bool) -> None:
    schema = {**requests(described, "/embed")["application/json"]["schema"], "components": described["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid({"inputs": [item]}) is valid


@pytest.mark.parametrize("path", ["/embed", "/cross-generate"])
def test_the_examples_fit_their_schema_and_show_every_modality(described: dict[str, Any], path: str) -> None:
    content = requests(described, path)
    schema = {**content["application/json"]["schema"], "components": described["components"]}
    for example in content["application/json"]["examples"].values():
        jsonschema.Draft202012Validator(schema).validate(example["value"])
    assert set(content["multipart/form-data"]["schema"]["properties"]) == {m.name for m in MODALITIES} | {"id", "options"}


def test_every_option_may_come_in_the_query(described: dict[str, Any]) -> None:
    names = {p["name"] for p in described["paths"]["/cross-generate"]["post"]["parameters"] if p["in"] == "query"}
    assert {"refine.steps", "refine.trace", "output.image", "targets", "seed", "model"} <= names


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key == "$ref":
                assert value.removeprefix("#/components/schemas/") in described["components"]["schemas"]
            walk(value)

    walk(copy.deepcopy(described))
