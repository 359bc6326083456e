"""OpenAI's own client, as it comes from the package index, against a live server."""

import asyncio
import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import pytest

from model.codec import Limits
from model.modality import ImageModality, Modality, TextModality
from service.calls import Item, Reader
from service.embeddings import parse, read
from service.errors import Problem

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
SDK = Callable[..., openai.OpenAI]


@pytest.fixture
def sdk(client: httpx.Client) -> Iterator[SDK]:
    """The client of a user who changed nothing but the address."""
    with contextlib.ExitStack() as stack:

        def make(server: httpx.Client = client, **options: Any) -> openai.OpenAI:
            asked = {"api_key": "none", "max_retries": 0, **options}
            return stack.enter_context(openai.OpenAI(base_url=f"{server.base_url}/v1", **asked))

        yield make


def test_strings_get_what_embed_answers(sdk: SDK, client: httpx.Client) -> None:
    answer = sdk().embeddings.create(input=["seven", "three"], model="digits")
    native = client.post("/embed", json={"inputs": [{"word": "seven"}, {"word": "three"}]}).json()["data"]
    assert [one.index for one in answer.data] == [0, 1]
    for one, expected in zip(answer.data, native, strict=True):
        np.testing.assert_allclose(one.embedding, expected["embedding"], atol=1e-5)
    assert (answer.object, answer.model) == ("list", "digits")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_one_string_in_both_formats(sdk: SDK, client: httpx.Client, encoding_format: Any) -> None:
    (one,) = sdk().embeddings.create(input="seven", model="digits", encoding_format=encoding_format, user="ada").data
    (expected,) = client.post("/embed", json={"inputs": [{"word": "seven"}]}).json()["data"]
    packed: Any = one.embedding
    numbers = np.frombuffer(base64.b64decode(packed), "<f4") if encoding_format == "base64" else packed
    np.testing.assert_allclose(numbers, expected["embedding"], atol=1e-5)


def test_objects_name_their_modalities(sdk: SDK, client: httpx.Client, values: dict[str, str]) -> None:
    inputs: Any = [{"photo": f"data:image/png;base64,{values['photo']}", "word": "seven"}, {"digit": values["digit"]}, "two"]
    answer = sdk().embeddings.create(input=inputs, model="digits")
    native = client.post("/embed", json={"inputs": [*inputs[:2], {"word": "two"}]}).json()["data"]
    for one, expected in zip(answer.data, native, strict=True):
        np.testing.assert_allclose(one.embedding, expected["embedding"], atol=1e-5)


def test_the_asynchronous_client_too(client: httpx.Client) -> None:
    async def ask() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none") as sdk:
            return (await sdk.embeddings.create(input="seven", model="digits")).data[0].embedding

    assert len(asyncio.run(ask())) == 32


def test_models_are_listed(sdk: SDK) -> None:
    (model,) = sdk().models.list().data
    assert (model.id, model.object, model.owned_by) == ("digits", "model", "concord")
    assert sdk().models.retrieve("digits") == model


def test_the_dimensions_are_the_bundles_own(sdk: SDK) -> None:
    assert len(sdk().embeddings.create(input="seven", model="digits", dimensions=32).data[0].embedding) == 32
    with pytest.raises(openai.UnprocessableEntityError, match="32 dimensions") as caught:
        sdk().embeddings.create(input="seven", model="digits", dimensions=16)
    assert (caught.value.param, caught.value.code) == ("dimensions", "out_of_range")


@pytest.mark.parametrize(
    ("asked", "expected", "code", "param"),
    [
        ({"input": ""}, openai.UnprocessableEntityError, "bad_text", "input[0].word"),
        ({"input": []}, openai.UnprocessableEntityError, "invalid_value", "input"),
        ({"input": ["one"] * 33}, openai.UnprocessableEntityError, "invalid_value", "input"),
        ({"input": [1, 2, 3]}, openai.UnprocessableEntityError, "invalid_value", "input[0]"),
        ({"input": ["one", [1, 2]]}, openai.UnprocessableEntityError, "invalid_value", "input[1]"),
        ({"input": [None]}, openai.UnprocessableEntityError, "invalid_value", "input[0]"),
        ({"input": [{}]}, openai.UnprocessableEntityError, "empty_subset", "input[0]"),
        ({"input": ["one", {"sound": "x"}]}, openai.UnprocessableEntityError, "unknown_modality", "input[1].sound"),
        ({"input": [{"photo": "data:image/png;base64,AAAA"}]}, openai.BadRequestError, "bad_image", "input[0].photo"),
        (
            {"input": [{"photo": "data:image/gif;base64,AAAA"}]},
            openai.APIStatusError,
            "unsupported_media_type",
            "input[0].photo",
        ),
        ({"input": "one", "model": "text-embedding-3-small"}, openai.NotFoundError, "unknown_model", None),
        ({"input": "one", "extra_body": {"sead": 1}}, openai.UnprocessableEntityError, "invalid_value", "sead"),
    ],
)
def test_errors_are_the_clients_own(
    sdk: SDK, asked: dict[str, Any], expected: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    with pytest.raises(expected) as caught:
        sdk().embeddings.create(**{"model": "digits", **asked})
    error = caught.value
    assert isinstance(error.body, dict)
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert len(error.body["message"]) > 10
    assert error.request_id == error.response.headers["x-request-id"]


def test_token_ids_are_told_apart(sdk: SDK) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="token ids are not taken: send a string"):
        sdk().embeddings.create(model="digits", input=[[3, 4]])


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "code"),
    [
        ("POST", "/v1/nothing", {}, b"", 404, "not_found"),
        ("POST", "/v1/chat/completions", {}, b"{}", 404, "not_found"),
        ("GET", "/v1/embeddings", {}, b"", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/digits", {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", {"content-type": "application/json"}, b"{", 400, "invalid_json"),
        (
            "POST",
            "/v1/embeddings",
            {"content-type": "multipart/form-data; boundary=b"},
            b"--b--",
            415,
            "unsupported_media_type",
        ),
        ("POST", "/v1/embeddings", {"content-type": "application/json"}, b" " * (33 << 20), 413, "too_large"),
        (
            "POST",
            "/v1/embeddings",
            {"content-type": "application/json", "x-request-timeout-ms": "x"},
            b"",
            422,
            "invalid_value",
        ),
    ],
)
def test_every_status_has_the_envelope(
    client: httpx.Client, method: str, path: str, headers: dict[str, str], content: bytes, status: int, code: str
) -> None:
    response = client.request(method, path, headers=headers, content=content)  # held against the envelope's schema
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_full_queue_is_retried_by_the_client_when_it_is_told(serve: Serve, sdk: SDK) -> None:
    with serve(max_queue_items=1, max_items=1) as server:
        busy = {"inputs": [{"word": "one"}], "refine": {"steps": 64}}

        async def crowd() -> list[int]:
            async with httpx.AsyncClient(base_url=server.base_url, trust_env=False) as many:
                asked = [many.post("/embed", json=busy) for _ in range(4)]
                once = asyncio.to_thread(lambda: sdk(server, max_retries=20).embeddings.create(input="one", model="digits"))
                *answers, patient = await asyncio.gather(*asked, once)
                assert len(patient.data) == 1
                return [answer.status_code for answer in answers]

        assert 503 in asyncio.run(crowd())


def test_a_key_that_is_missing_wrong_or_spent(serve: Serve, sdk: SDK, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-key-of-a-lovelace ada 0.001\n")
    with serve(api_keys_file=tmp_path / "keys", max_items=2) as server:
        with pytest.raises(openai.PermissionDeniedError) as wrong:
            sdk(server, api_key="not-the-key-of-ada").models.list()
        assert (wrong.value.code, wrong.value.type) == ("wrong_key", "permission_error")
        missing = server.get("/v1/models")
        assert (missing.status_code, missing.json()["error"]["type"]) == (401, "authentication_error")
        known = sdk(server, api_key="the-key-of-a-lovelace")
        known.embeddings.create(input=["one", "two"], model="digits")
        with pytest.raises(openai.RateLimitError) as spent:
            known.embeddings.create(input="one", model="digits")
        assert (spent.value.code, spent.value.type) == ("quota_exceeded", "rate_limit_error")
        assert int(spent.value.response.headers["retry-after-ms"]) > 1000


WORD = TextModality(name="word", length=5, alphabet=" abcdefgh")
TITLE = TextModality(name="title", length=5, alphabet=" abcdefgh")
PHOTO = ImageModality(name="photo", channels=3, height=4, width=4)


@pytest.mark.parametrize(
    ("modalities", "told"),
    [((PHOTO,), "no modality of text"), ((WORD, PHOTO, TITLE), "several modalities of text: word, title")],
)
def test_a_string_without_a_place_to_go(modalities: tuple[Modality, ...], told: str) -> None:
    reader = Reader(modalities, Limits(), max_items=2, max_refine_steps=0)
    with pytest.raises(Problem, match=told):
        read(reader, 8, *parse(b'{"input": "abc"}', 9))


def test_with_several_texts_an_object_says_which() -> None:
    reader = Reader((WORD, PHOTO, TITLE), Limits(), max_items=2, max_refine_steps=0)
    (item,) = read(reader, 8, *parse(orjson.dumps({"input": [{"title": "abc"}]}), 9)).items
    assert isinstance(item, Item)
    assert list(item.row) == ["title"]


def test_items_are_charged_before_they_are_decoded() -> None:
    charged: list[int] = []

    def charge(items: int) -> None:
        charged.append(items)
        raise Problem("quota_exceeded", "no")

    reader = Reader((WORD,), Limits(), max_items=2, max_refine_steps=0)
    with pytest.raises(Problem, match="no"):
        read(reader, 8, *parse(b'{"input": ["?", "?"]}', 9), charge)
    assert charged == [2]
