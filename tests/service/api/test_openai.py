"""POST /v1/embeddings: OpenAI's unchanged Python client against a live server, and parsing."""

import asyncio
import base64
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import pytest

from concord.model.codec import Limits
from concord.model.modality import ImageModality, Modality, TextModality
from concord.model.runtime import Runtime
from concord.service.api.openai import load
from concord.service.api.requests import Charge, ParsedItem, RejectedItem, RequestParser
from concord.service.errors import Problem
from tests.support.metrics import scrape
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import wait_for

SDK = Callable[..., openai.OpenAI]


@pytest.fixture
def sdk(client: httpx.Client) -> Iterator[SDK]:
    """Function that makes an OpenAI client for a server; only its address differs from the default."""
    with contextlib.ExitStack() as stack:

        def make(server: httpx.Client = client, **options: Any) -> openai.OpenAI:
            arguments = {"api_key": "none", "max_retries": 0, **options}
            return stack.enter_context(openai.OpenAI(base_url=f"{server.base_url}/v1", **arguments))

        yield make


def test_strings_get_the_embeddings_of_embed(sdk: SDK, client: httpx.Client) -> None:
    response = sdk().embeddings.create(input=["seven", "three"], model="digits")
    native = client.post("/embed", json={"inputs": [{"word": "seven"}, {"word": "three"}]}).json()["data"]
    assert [embedding.index for embedding in response.data] == [0, 1]
    for embedding, expected in zip(response.data, native, strict=True):
        np.testing.assert_allclose(embedding.embedding, expected["embedding"], atol=1e-5)
    assert (response.object, response.model) == ("list", "digits")
    assert (response.usage.prompt_tokens, response.usage.total_tokens) == (10, 10)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_single_string_in_both_encoding_formats(sdk: SDK, client: httpx.Client, encoding_format: Any) -> None:
    (embedding,) = sdk().embeddings.create(input="seven", model="digits", encoding_format=encoding_format, user="ada").data
    (expected,) = client.post("/embed", json={"inputs": [{"word": "seven"}]}).json()["data"]
    packed: Any = embedding.embedding
    numbers = np.frombuffer(base64.b64decode(packed), "<f4") if encoding_format == "base64" else packed
    np.testing.assert_allclose(numbers, expected["embedding"], atol=1e-5)


def test_object_inputs_name_their_modalities(sdk: SDK, client: httpx.Client, values: dict[str, str]) -> None:
    inputs: Any = [{"photo": f"data:image/png;base64,{values['photo']}", "word": "seven"}, {"digit": values["digit"]}, "two"]
    response = sdk().embeddings.create(input=inputs, model="digits")
    native = client.post("/embed", json={"inputs": [*inputs[:2], {"word": "two"}]}).json()["data"]
    for embedding, expected in zip(response.data, native, strict=True):
        np.testing.assert_allclose(embedding.embedding, expected["embedding"], atol=1e-5)


def test_asynchronous_client_gets_an_embedding(client: httpx.Client) -> None:
    async def embed() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none") as sdk:
            return (await sdk.embeddings.create(input="seven", model="digits")).data[0].embedding

    assert len(asyncio.run(embed())) == 32


def test_models_list_and_retrieve(sdk: SDK) -> None:
    (model,) = sdk().models.list().data
    assert (model.id, model.object, model.owned_by) == ("digits", "model", "concord")
    assert sdk().models.retrieve("digits") == model


def test_dimensions_other_than_latent_are_rejected(sdk: SDK) -> None:
    assert len(sdk().embeddings.create(input="seven", model="digits", dimensions=32).data[0].embedding) == 32
    with pytest.raises(openai.UnprocessableEntityError, match="32 dimensions") as caught:
        sdk().embeddings.create(input="seven", model="digits", dimensions=16)
    assert (caught.value.param, caught.value.code) == ("dimensions", "out_of_range")


@pytest.mark.parametrize(
    ("arguments", "expected", "code", "param"),
    [
        ({"input": ""}, openai.UnprocessableEntityError, "bad_text", "input[0].word"),
        ({"input": []}, openai.UnprocessableEntityError, "invalid_value", "input"),
        ({"input": ["one"] * 2049}, openai.UnprocessableEntityError, "invalid_value", "input"),
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
def test_errors_become_the_clients_exceptions(
    sdk: SDK, arguments: dict[str, Any], expected: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    with pytest.raises(expected) as caught:
        sdk().embeddings.create(**{"model": "digits", **arguments})
    error = caught.value
    assert isinstance(error.body, dict)
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert len(error.body["message"]) > 10
    assert error.request_id == error.response.headers["x-request-id"]


def test_token_ids_are_rejected_with_a_remedy(sdk: SDK) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="token ids are not accepted: send a string"):
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
def test_every_error_status_has_openais_envelope(
    client: httpx.Client, method: str, path: str, headers: dict[str, str], content: bytes, status: int, code: str
) -> None:
    response = client.request(method, path, headers=headers, content=content)  # validated against the envelope's schema
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_full_queue_is_retried_by_the_client(serve: Serve, sdk: SDK, runtime: Runtime) -> None:
    gated = GatedRuntime(runtime.bundle, threads=1)
    with serve(gated, max_queue_items=1, max_items=1) as server, ThreadPoolExecutor(2) as pool:
        gated.close()
        held = pool.submit(server.post, "/embed", json={"inputs": [{"word": "one"}]})
        gated.wait_until_entered()
        retried = pool.submit(sdk(server, max_retries=20).embeddings.create, input="one", model="digits")
        wait_for(lambda: scrape(server, "concord_rejections_total", reason="queue_full") >= 1)
        gated.open()
        assert held.result().status_code == 200
        assert len(retried.result().data) == 1


def test_missing_wrong_and_spent_keys_get_openais_errors(serve: Serve, sdk: SDK, tmp_path: Path) -> None:
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


def parse(body: bytes, *modalities: Modality, charge: Charge = lambda _: None) -> list[ParsedItem | RejectedItem]:
    parser = RequestParser(modalities, 8, Limits(), max_items=2, max_refine_steps=0)
    raw = load(body, 9, max_texts=32)
    return parser.parse_items(raw.items(parser), raw.pointer, charge)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [((PHOTO,), "no text modality"), ((WORD, PHOTO, TITLE), "several text modalities: word, title")],
)
def test_string_without_one_text_modality_is_rejected(modalities: tuple[Modality, ...], message: str) -> None:
    with pytest.raises(Problem, match=message):
        parse(b'{"input": "abc"}', *modalities)


def test_object_chooses_among_several_text_modalities() -> None:
    (item,) = parse(orjson.dumps({"input": [{"title": "abc"}]}), WORD, PHOTO, TITLE)
    assert isinstance(item, ParsedItem)
    assert list(item.row) == ["title"]


def test_items_are_charged_before_they_are_parsed() -> None:
    charged: list[int] = []

    def charge(items: int) -> None:
        charged.append(items)
        raise Problem("quota_exceeded", "no")

    with pytest.raises(Problem, match="no"):
        parse(b'{"input": ["?", "?"]}', WORD, charge=charge)
    assert charged == [2]
