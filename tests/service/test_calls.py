"""What a body says, read: over HTTP for the built-in bundle, and directly for the kinds of modality that it lacks."""

import base64
import string
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from model.codec import Limits
from model.modality import BinaryModality, ImageModality, TextModality, VectorModality
from service.body import Form
from service.calls import Call, Item, Reader, Rejected, SlowError, parse
from service.errors import Problem
from service.schemas import EmbedOptions, GenerateOptions
from tests.attacks import png

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
    return READER.read(parse(orjson.dumps({"inputs": [item]}), query or [], EmbedOptions, READER.most_values))


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
    (item,) = READER.read(parse(Form(sample, None), [], EmbedOptions, READER.most_values)).items
    assert isinstance(item, Item)
    np.testing.assert_array_equal(item.row["sensor"], np.float32([1, 2, 3]))
    np.testing.assert_array_equal(item.row["face"], np.float32([1, 0]))


def test_a_fault_within_a_value_has_its_place() -> None:
    (item,) = read({"sensor": [1, "x", 3]}).items
    assert isinstance(item, Rejected)
    assert item.problem.faults[0].pointer == "/inputs/0/sensor/1"


def test_an_items_fault_is_no_fault_of_the_call() -> None:
    call = READER.read(parse(orjson.dumps({"inputs": [{"word": "a"}, {"word": 1}]}), [], EmbedOptions, READER.most_values))
    assert [type(item) for item in call.items] == [Item, Rejected]


def test_the_query_names_options_with_dots_and_the_body_overrules_each() -> None:
    body = orjson.dumps({"inputs": [{"word": "a"}], "refine": {"steps": 3}, "seed": 1})
    query = [("refine.steps", "5"), ("refine.tolerance", "0.5"), ("seed", "9"), ("normalize", "true")]
    options = READER.read(parse(body, query, EmbedOptions, READER.most_values)).options
    assert (options.refine.steps, options.refine.tolerance, options.seed, options.normalize) == (3, 0.5, 1, True)


def test_what_the_body_overrules_must_be_right_too() -> None:
    body = orjson.dumps({"inputs": [{"word": "a"}], "refine": {"steps": 3}})
    with pytest.raises(Problem) as raised:
        READER.read(parse(body, [("refine.steps", "55386253")], EmbedOptions, READER.most_values))
    assert (raised.value.faults[0].pointer, raised.value.faults[0].code) == ("/refine/steps", "out_of_range")


def test_a_list_in_the_query_is_a_name_repeated() -> None:
    query = [("targets", "face"), ("targets", "photo"), ("output.image", "webp")]
    options = READER.read(parse(orjson.dumps({"inputs": [{"word": "a"}]}), query, GenerateOptions, READER.most_values)).options
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
        READER.read(parse(orjson.dumps({"inputs": [{"word": "a"}], "refine": None}), [], EmbedOptions, READER.most_values))


BAD = [
    ("/embed", {}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": []}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": [{"word": "one"}] * 33}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": {"word": "one"}}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": [{}]}, 422, "empty_subset", "/inputs/0"),
    ("/embed", {"inputs": [{"id": "a", "word": None}]}, 422, "empty_subset", "/inputs/0"),
    ("/embed", {"inputs": [{"so/und~": "x"}]}, 422, "unknown_modality", "/inputs/0/so~1und~0"),
    ("/embed", {"inputs": [{"word": 7}]}, 422, "wrong_type", "/inputs/0/word"),
    ("/embed", {"inputs": [{"word": ""}]}, 422, "bad_text", "/inputs/0/word"),
    ("/embed", {"inputs": [{"word": "a" * 10_001}]}, 413, "too_large", "/inputs/0/word"),
    ("/embed", {"inputs": [{"word": "one"}, {"photo": "!"}]}, 400, "bad_base64", "/inputs/1/photo"),
    ("/embed", {"inputs": [{"photo": {"data": "AAAA"}}]}, 400, "bad_image", "/inputs/0/photo/data"),
    ("/embed", {"inputs": [{"photo": "data:image/gif;base64,AAAA"}]}, 415, "unsupported_media_type", "/inputs/0/photo"),
    ("/embed", {"inputs": [{"word": "one", "id": "x" * 129}]}, 422, "invalid_value", "/inputs/0/id"),
    ("/embed", {"inputs": [{"word": "one"}], "sead": 1}, 422, "invalid_value", "/sead"),
    ("/embed", {"inputs": [{"word": "one"}], "seed": -1}, 422, "invalid_value", "/seed"),
    ("/embed", {"inputs": [{"word": "one"}], "seed": "1"}, 422, "invalid_value", "/seed"),
    ("/embed", {"inputs": [{"word": "one"}], "seed": 2**63}, 422, "invalid_value", "/seed"),
    ("/embed", {"inputs": [{"word": "one"}], "refine": {"steps": 1.5}}, 422, "invalid_value", "/refine/steps"),
    ("/embed", {"inputs": [{"word": "one"}], "refine": {"steps": 10**9}}, 422, "out_of_range", "/refine/steps"),
    ("/embed", {"inputs": [{"word": "one"}], "refine": {"budget_ms": 0}}, 422, "invalid_value", "/refine/budget_ms"),
    ("/embed", {"inputs": [{"word": "one"}], "targets": ["photo"]}, 422, "invalid_value", "/targets"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "targets": []}, 422, "invalid_value", "/targets"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "targets": ["sound"]}, 422, "unknown_modality", "/targets/0"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "targets": ["word", "word"]}, 422, "invalid_value", "/targets/1"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "num_samples": 129}, 422, "out_of_range", "/num_samples"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "num_samples": 0}, 422, "invalid_value", "/num_samples"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "temperature": 11}, 422, "invalid_value", "/temperature"),
    ("/cross-generate", {"inputs": [{"word": "one"}], "output": {"image": "gif"}}, 422, "invalid_value", "/output/image"),
]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_and_where(client: httpx.Client, case: tuple[str, dict[str, Any], int, str, str]) -> None:
    path, content, status, code, pointer = case
    response = client.post(path, json=content)
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["errors"][0]["pointer"] == pointer
    assert problem["instance"] == f"urn:request:{response.headers['x-request-id']}"


def test_an_unknown_modality_is_told_the_valid_ones(client: httpx.Client) -> None:
    detail = client.post("/embed", json={"inputs": [{"sound": "x"}]}).json()["errors"][0]["detail"]
    assert all(name in detail for name in ("digit", "photo", "word"))


def test_every_fault_of_every_item_is_told(client: httpx.Client) -> None:
    problem = client.post("/embed", json={"inputs": [{"word": "?", "sound": 1}, {"word": "one"}, {}]}).json()
    assert [e["pointer"] for e in problem["errors"]] == ["/inputs/0/sound", "/inputs/0/word", "/inputs/2"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b'{"inputs": [{"word": NaN}]}', 400, "invalid_json"),
        (b'{"inputs": [{"word": "one"}], "temperature": Infinity}', 400, "invalid_json"),
        (b'{"inputs": [{"word": "one"}], "seed": 1e999}', 400, "invalid_json"),
        (b'{"inputs": [{"word": "\\ud800"}]}', 400, "invalid_json"),
        (b'{"inputs": [{"word": "\xff"}]}', 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b'{"inputs":' + b"[" * 100_000, 400, "invalid_json"),
        (b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}", 422, "invalid_value"),
        (b"[]", 422, "invalid_value"),
        (b'{"inputs": [{"word": "one"}], "seed": ' + b"9" * 300 + b"}", 422, "invalid_value"),
        (b'{"inputs": [{"word": "a\\u0000"}]}', 422, "bad_text"),
        (b'{"inputs": [{"word": "one"}], ' + b",".join(b'"k%d": 1' % n for n in range(10**6)) + b"}", 413, "too_large"),
        (b'{"inputs": [{"word": "one"}], ' + b",".join(b'"k%d": 1' % n for n in range(10_000)) + b"}", 422, "invalid_value"),
        (b'{"inputs": [{' + b",".join(b'"k%d": 1' % n for n in range(10_000)) + b"}]}", 422, "unknown_modality"),
        (b'{"inputs": [' + b"[]," * 5_000_000 + b"[]]}", 413, "too_large"),
    ],
)
def test_hostile_json(client: httpx.Client, content: bytes, status: int, code: str) -> None:
    started = time.process_time()
    response = client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert len(response.content) < 10_000
    assert time.process_time() - started < 0.5


def test_of_a_key_given_twice_the_last_counts(client: httpx.Client) -> None:
    twice = b'{"inputs": [{"word": "one"}], "inputs": [{"word": "two"}, {"word": "six"}]}'
    response = client.post("/embed", content=twice, headers={"content-type": "application/json"})
    assert len(response.json()["data"]) == 2


def photo(side: int) -> str:
    return base64.b64encode(png(width=side, height=side)).decode()


@pytest.mark.parametrize(
    "items",
    [
        [{"photo": photo(129)}],
        [{"word": "hello"}, {"word": "hello", "photo": photo(400)}],
        [{"word": "hello"}] * 5,
    ],
    ids=["pixels", "pixels of the second", "items"],
)
def test_what_takes_long_is_not_done_quickly_and_not_charged(items: list[dict[str, str]]) -> None:
    reader = replace(READER, max_items=8)
    asked = parse(orjson.dumps({"inputs": items}), [], EmbedOptions, reader.most_values)
    charged: list[int] = []
    with pytest.raises(SlowError):
        reader.read(asked, charged.append, quickly=True)
    assert charged == []
    assert len(reader.read(asked, charged.append).items) == len(items)
    assert charged == [len(items)]


def test_what_is_done_quickly_is_done_alike() -> None:
    items = [{"photo": photo(128), "word": "hello"}, {"word": "9", "id": "b"}]
    asked = parse(orjson.dumps({"inputs": items}), [], EmbedOptions, READER.most_values)
    charged: list[int] = []
    quick, slow = READER.read(asked, charged.append, quickly=True), READER.read(asked)
    assert charged == [2]
    np.testing.assert_array_equal(quick.items[0].row["photo"], slow.items[0].row["photo"])
    assert str(quick.items[1].problem) == str(slow.items[1].problem)
