"""The reader with kinds of modality that the built-in bundle lacks."""

import base64
import string
from typing import Any

import numpy as np
import orjson
import pytest

from model.codec import Limits
from model.modality import BinaryModality, ImageModality, TextModality, VectorModality
from service.body import Form
from service.calls import Call, Item, Reader, Rejected
from service.errors import Problem
from service.schemas import EmbedOptions, GenerateOptions

READER = Reader(
    (
        VectorModality(name="sensor", size=3),
        BinaryModality(name="face", attributes=("smile", "hat")),
        TextModality(name="word", length=5, alphabet=" " + string.ascii_lowercase),
        ImageModality(name="photo", channels=3, height=4, width=4),
    ),
    Limits(),
    max_items=2,
    max_refine_steps=8,
)


def read(item: dict[str, Any], query: list[tuple[str, str]] | None = None) -> Call[EmbedOptions]:
    return READER.read(orjson.dumps({"inputs": [item]}), query or [], EmbedOptions)


def test_rows_come_in_the_bundles_order_with_what_they_used() -> None:
    (item,) = read({"word": "hello", "id": "a", "face": [1, 0], "sensor": [1, 2.5, -3]}).items
    assert isinstance(item, Item)
    assert list(item.row) == ["sensor", "face", "word"]
    assert (item.id, item.images, item.text_characters) == ("a", 0, 5)
    np.testing.assert_array_equal(item.row["sensor"], np.float32([1, 2.5, -3]))


@pytest.mark.parametrize(
    "sample",
    [
        {"sensor": "[1, 2, 3]", "face": '{"smile": true, "hat": false}'},
        {"sensor": b"[1, 2, 3]", "face": b"[1, 0]"},
        {
            "sensor": orjson.dumps(
                {"data": base64.b64encode(np.float32([1, 2, 3]).tobytes()).decode(), "dtype": "float32"}
            ).decode(),
            "face": "[true, false]",
        },
    ],
)
def test_a_forms_fields_hold_json_for_numbers(sample: dict[str, str | bytes]) -> None:
    (item,) = READER.read(Form(sample, None), [], EmbedOptions).items
    assert isinstance(item, Item)
    np.testing.assert_array_equal(item.row["sensor"], np.float32([1, 2, 3]))
    np.testing.assert_array_equal(item.row["face"], np.float32([1, 0]))


def test_a_fault_within_a_value_has_its_place() -> None:
    (item,) = read({"sensor": [1, "x", 3]}).items
    assert isinstance(item, Rejected)
    assert item.problem.faults[0].pointer == "/inputs/0/sensor/1"


def test_an_items_fault_is_no_fault_of_the_call() -> None:
    call = READER.read(orjson.dumps({"inputs": [{"word": "a"}, {"word": 1}]}), [], EmbedOptions)
    assert [type(item) for item in call.items] == [Item, Rejected]


def test_the_query_names_options_with_dots_and_the_body_overrules_each() -> None:
    body = orjson.dumps({"inputs": [{"word": "a"}], "refine": {"steps": 3}, "seed": 1})
    query = [("refine.steps", "5"), ("refine.tolerance", "0.5"), ("seed", "9"), ("normalize", "true")]
    options = READER.read(body, query, EmbedOptions).options
    assert (options.refine.steps, options.refine.tolerance, options.seed, options.normalize) == (3, 0.5, 1, True)


def test_a_list_in_the_query_is_a_name_repeated() -> None:
    query = [("targets", "face"), ("targets", "photo"), ("output.image", "webp")]
    options = READER.read(orjson.dumps({"inputs": [{"word": "a"}]}), query, GenerateOptions).options
    assert (options.targets, options.output.image) == (["face", "photo"], "webp")


@pytest.mark.parametrize(
    ("name", "value", "pointer"),
    [
        ("seed", "x", "/seed"),
        ("refine.steps", "many", "/refine/steps"),
        ("refine.stepz", "1", "/refine/stepz"),
        ("refine", "1", "/refine"),
        ("seed.x", "1", "/seed"),
        ("", "1", "/"),
        (".", "1", "/"),
        ("targets", "photo", "/targets"),
        ("inputs", "x", "/inputs"),
        ("model.x.y", "1", "/model"),
    ],
)
def test_a_bad_query_is_told_where(name: str, value: str, pointer: str) -> None:
    with pytest.raises(Problem) as caught:
        read({"word": "a"}, [(name, value)])
    assert (caught.value.status, caught.value.faults[0].pointer) == (422, pointer)


def test_a_null_option_is_not_a_default() -> None:
    with pytest.raises(Problem, match="/refine"):
        READER.read(orjson.dumps({"inputs": [{"word": "a"}], "refine": None}), [], EmbedOptions)
