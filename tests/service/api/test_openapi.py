"""The OpenAPI document for kinds of modality that the built-in bundle lacks."""

import copy
from typing import Any

import jsonschema
import pytest

from concord.model.modality import (
    BinaryModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    TextModality,
    VectorModality,
)
from concord.model.runtime import Runtime
from concord.service.api.openapi import document
from concord.service.app import create
from concord.service.settings import Settings

MODALITIES = (
    VectorModality(name="sensor", size=3),
    BinaryModality(name="face", attributes=("smile", "hat")),
    TextModality(name="word", length=5, alphabet=" abc"),
    TextModality(name="title", length=3, unit="word", vocabulary=("blue", "cup")),
    CategoricalModality(name="brand", classes=("acme", "zenith")),
    ImageModality(name="scan", channels=2, height=2, width=2),
    VectorModality(name="weight", size=1),
    CategoricalModality(name="year", classes=("2011", "2012", "--5", "007", "0.5")),
    BinaryModality(name="sold", attributes=("sold",)),
    EncodedModality(name="review", kind="text", encoder="texts", size=4),
)


@pytest.fixture(scope="module")
def generated(runtime: Runtime) -> dict[str, Any]:
    return document(create([runtime], Settings()), MODALITIES, Settings(max_items=4))


def request_content(generated: dict[str, Any], path: str) -> dict[str, Any]:
    content: dict[str, Any] = generated["paths"][path]["post"]["requestBody"]["content"]
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
        ({"title": ["a", "b"]}, False),
        ({"review": "a text"}, True),
        ({"review": ["a text", "another one"]}, True),
        ({"review": []}, False),
        ({"review": ["a"] * 17}, False),
        ({"review": ["a", 3]}, False),
        ({"review": [0.5, 1, 2, 3]}, True),
        ({"brand": "acme"}, True),
        ({"brand": "Acme"}, False),
        ({"scan": {"data": "AAAA", "shape": [2, 2, 2], "dtype": "float32"}}, True),
        ({"scan": {"data": "AAAA", "shape": [2, 2, 3], "dtype": "float32"}}, False),
        ({"scan": "AAAA"}, False),
        ({"face": [0, True]}, True),
        ({"face": {"smile": True, "hat": 0}}, True),
        ({"face": {"smile": True}}, False),
        ({"weight": 2.5}, True),
        ({"weight": [2.5]}, True),
        ({"sensor": 2.5}, False),
        ({"year": "2012"}, True),
        ({"year": 2012}, True),
        ({"year": 2012.0}, True),
        ({"year": 7}, False),
        ({"brand": 1}, False),
        ({"sold": True}, True),
        ({"face": [1.0, 0.0]}, True),
        ({"face": True}, False),
        ({"word": "abc", "face": None, "id": "x"}, True),
        ({"word": None}, False),
        ({"id": "x"}, False),
        ({"photo": "x", "word": "abc"}, False),
    ],
)
def test_item_schema_accepts_what_the_modalities_allow(generated: dict[str, Any], item: dict[str, Any], valid: bool) -> None:
    schema = {**request_content(generated, "/embed")["application/json"]["schema"], "components": generated["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid({"inputs": [item]}) is valid


@pytest.mark.parametrize("path", ["/embed", "/cross-generate"])
def test_examples_match_their_schema_and_the_form_has_every_modality(generated: dict[str, Any], path: str) -> None:
    content = request_content(generated, path)
    schema = {**content["application/json"]["schema"], "components": generated["components"]}
    for example in content["application/json"]["examples"].values():
        jsonschema.Draft202012Validator(schema).validate(example["value"])
    assert set(content["multipart/form-data"]["schema"]["properties"]) == {m.name for m in MODALITIES} | {"id", "options"}


def test_document_lists_every_option_as_a_query_parameter(generated: dict[str, Any]) -> None:
    names = {p["name"] for p in generated["paths"]["/cross-generate"]["post"]["parameters"] if p["in"] == "query"}
    assert {"refine.steps", "refine.trace", "output.image", "targets", "seed", "model"} <= names


def test_references_of_the_document_resolve(generated: dict[str, Any]) -> None:
    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key == "$ref":
                assert value.removeprefix("#/components/schemas/") in generated["components"]["schemas"]
            walk(value)

    walk(copy.deepcopy(generated))
