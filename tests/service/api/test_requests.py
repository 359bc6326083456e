"""Request bodies are parsed into items: over HTTP for the built-in bundle, and directly for kinds of modality that it lacks."""

import base64
import string
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from concord.model.codec import Limits
from concord.model.modality import BinaryModality, ImageModality, TextModality, VectorModality
from concord.service.api.body import Form
from concord.service.api.requests import O, ParsedItem, RejectedItem, RequestParser, WouldBlock, load
from concord.service.api.schemas import EmbedOptions, GenerateOptions
from concord.service.errors import Problem
from tests.support.hostile_files import black_png
from tests.support.images import to_base64
from tests.support.sounds import SOUND

PARSER = RequestParser(
    (
        VectorModality(name="sensor", size=3),
        BinaryModality(name="face", attributes=("smile", "hat")),
        TextModality(name="word", length=5, alphabet=" " + string.ascii_lowercase),
        ImageModality(name="photo", channels=3, height=4, width=4),
    ),
    latent=8,
    limits=Limits(),
    max_items=2,
    max_refine_steps=8,
)

Items = list[ParsedItem | RejectedItem]


def parse(
    body: bytes | Form, query: list[tuple[str, str]], options: type[O], parser: RequestParser = PARSER, **arguments: Any
) -> tuple[O, Items]:
    """Return the options and the items of a body. ``arguments`` are those of ``RequestParser.parse_items``."""
    raw = load(body, query, options, parser.max_values)
    return raw.options, parser.parse_items(raw.items(parser), raw.pointer, **arguments)


def parse_one(item: dict[str, Any], query: list[tuple[str, str]] | None = None) -> ParsedItem | RejectedItem:
    _, (parsed,) = parse(orjson.dumps({"inputs": [item]}), query or [], EmbedOptions)
    return parsed


def test_parse_items_orders_rows_as_the_bundle_and_counts_usage() -> None:
    item = parse_one({"word": "hello", "id": "a", "face": [1, 0], "sensor": [1, 2.5, -3]})
    assert isinstance(item, ParsedItem)
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
def test_parse_form_reads_numbers_as_json(sample: dict[str, str | bytes]) -> None:
    _, (item,) = parse(Form(sample, None), [], EmbedOptions)
    assert isinstance(item, ParsedItem)
    np.testing.assert_array_equal(item.row["sensor"], np.float32([1, 2, 3]))
    np.testing.assert_array_equal(item.row["face"], np.float32([1, 0]))


def test_fault_inside_a_value_has_its_pointer() -> None:
    item = parse_one({"sensor": [1, "x", 3]})
    assert isinstance(item, RejectedItem)
    assert item.problem.faults[0].pointer == "/inputs/0/sensor/1"


def test_fault_of_one_item_leaves_the_others() -> None:
    _, items = parse(orjson.dumps({"inputs": [{"word": "a"}, {"word": 1}]}), [], EmbedOptions)
    assert [type(item) for item in items] == [ParsedItem, RejectedItem]


def test_body_options_take_precedence_over_query_options() -> None:
    body = orjson.dumps({"inputs": [{"word": "a"}], "refine": {"steps": 3}, "seed": 1})
    query = [("refine.steps", "5"), ("refine.tolerance", "0.5"), ("seed", "9"), ("normalize", "true")]
    options, _ = parse(body, query, EmbedOptions)
    assert (options.refine.steps, options.refine.tolerance, options.seed, options.normalize) == (3, 0.5, 1, True)


def test_query_steps_above_the_limit_fail_even_if_the_body_replaces_them() -> None:
    body = orjson.dumps({"inputs": [{"word": "a"}], "refine": {"steps": 3}})
    with pytest.raises(Problem) as raised:
        parse(body, [("refine.steps", "55386253")], EmbedOptions)
    assert (raised.value.faults[0].pointer, raised.value.faults[0].code) == ("/refine/steps", "out_of_range")


def test_repeated_query_parameter_becomes_a_list() -> None:
    query = [("targets", "face"), ("targets", "photo"), ("output.image", "webp")]
    options, _ = parse(orjson.dumps({"inputs": [{"word": "a"}]}), query, GenerateOptions)
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
        ("model" + ".x.y", "1", "/model"),
    ],
)
def test_invalid_query_option_has_its_pointer(name: str, value: str, pointer: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_one({"word": "a"}, [(name, value)])
    assert (caught.value.status, caught.value.faults[0].pointer) == (422, pointer)


INVALID = [
    ("/embed", {}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": []}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": [{"word": "one"}] * 33}, 422, "invalid_value", "/inputs"),
    ("/embed", {"inputs": "one"}, 422, "invalid_value", "/inputs"),
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


@pytest.mark.parametrize("case", INVALID)
def test_invalid_request_gets_code_and_pointer(client: httpx.Client, case: tuple[str, dict[str, Any], int, str, str]) -> None:
    path, content, status, code, pointer = case
    response = client.post(path, json=content)
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["errors"][0]["pointer"] == pointer
    assert problem["instance"] == f"urn:request:{response.headers['x-request-id']}"


def test_unknown_modality_error_lists_the_valid_ones(client: httpx.Client) -> None:
    detail = client.post("/embed", json={"inputs": [{"sound": "x"}]}).json()["errors"][0]["detail"]
    assert all(name in detail for name in ("digit", "photo", "word"))


def test_errors_list_every_fault_of_every_item(client: httpx.Client) -> None:
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
def test_hostile_json_is_rejected_cheaply(client: httpx.Client, content: bytes, status: int, code: str) -> None:
    """It costs about as much processor time as a harmless body of the same size."""

    def post(content: bytes) -> tuple[httpx.Response, float]:
        began = time.process_time()
        response = client.post("/embed", content=content, headers={"content-type": "application/json"})
        return response, time.process_time() - began

    harmless, harmless_seconds = post(b'{"inputs": [{"word": "one"}]}'.ljust(len(content)))
    assert harmless.status_code == 200
    tries = [post(content) for _ in range(3)]  # the time counts all threads of the process, so another one may add to it
    for response, _ in tries:
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert len(response.content) < 10_000
    assert min(seconds for _, seconds in tries) < 5 * max(harmless_seconds, 0.02)


def test_repeated_json_key_uses_the_last_value(client: httpx.Client) -> None:
    content = b'{"inputs": [{"word": "one"}], "inputs": [{"word": "two"}, {"word": "six"}]}'
    response = client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert len(response.json()["data"]) == 2


def photo(side: int) -> str:
    return to_base64(black_png(width=side, height=side))


@pytest.mark.parametrize(
    "items",
    [
        [{"photo": photo(129)}],
        [{"word": "hello"}, {"word": "hello", "photo": photo(400)}],
        [{"word": "hello"}] * 5,
    ],
    ids=["pixels", "pixels of the second", "items"],
)
def test_parse_items_inline_raises_would_block_without_charging(items: list[dict[str, str]]) -> None:
    parser = replace(PARSER, max_items=8)
    body = orjson.dumps({"inputs": items})
    charged: list[int] = []
    with pytest.raises(WouldBlock):
        parse(body, [], EmbedOptions, parser, charge=charged.append, allow_blocking=False)
    assert charged == []
    assert len(parse(body, [], EmbedOptions, parser, charge=charged.append)[1]) == len(items)
    assert charged == [len(items)]


def test_sounds_are_not_parsed_inline() -> None:
    """The spectrogram of a short clip takes as long as that of a long one: milliseconds."""
    parser = replace(PARSER, modalities=(*PARSER.modalities, SOUND))
    with pytest.raises(WouldBlock):
        parser.parse_items([{"sound": "UklGRg=="}], "/inputs", allow_blocking=False)
    (item,) = parser.parse_items([{"sound": "UklGRg=="}], "/inputs")
    assert isinstance(item, RejectedItem)


def test_parse_items_inline_equals_blocking() -> None:
    body = orjson.dumps({"inputs": [{"photo": photo(128), "word": "hello"}, {"word": "9", "id": "b"}]})
    charged: list[int] = []
    _, inline = parse(body, [], EmbedOptions, charge=charged.append, allow_blocking=False)
    _, blocking = parse(body, [], EmbedOptions)
    assert charged == [2]
    assert isinstance(inline[0], ParsedItem)
    assert isinstance(blocking[0], ParsedItem)
    np.testing.assert_array_equal(inline[0].row["photo"], blocking[0].row["photo"])
    assert isinstance(inline[1], RejectedItem)
    assert isinstance(blocking[1], RejectedItem)
    assert str(inline[1].problem) == str(blocking[1].problem)
