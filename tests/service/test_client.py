"""The client against a live server, and against one that refuses by a script where the real one cannot be made to."""

import asyncio
import base64
import contextlib
import io
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.client import AsyncClient, Client, pause
from service.replies import (
    AccessError,
    DeadlineError,
    Embeddings,
    Failure,
    InvalidRequestError,
    UnavailableError,
)

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
Ask = Callable[..., Any]
Refusals = list[tuple[int, dict[str, str]]]


@pytest.fixture(params=["blocking", "asynchronous"])
def ask(request: pytest.FixtureRequest, client: httpx.Client) -> Ask:
    """``ask("embed", ..., to=url, client={...}, **options)`` through either client."""

    def blocking(call: str, *inputs: Any, to: Any = client.base_url, client: Any = None, **options: Any) -> Any:
        with Client(str(to), **(client or {})) as own:
            return getattr(own, call)(*inputs, **options)

    async def awaiting(call: str, *inputs: Any, to: Any = client.base_url, client: Any = None, **options: Any) -> Any:
        async with AsyncClient(str(to), **(client or {})) as own:
            answer: Awaitable[Any] = getattr(own, call)(*inputs, **options)
            return await answer

    return blocking if request.param == "blocking" else lambda *args, **options: asyncio.run(awaiting(*args, **options))


@contextlib.contextmanager
def refusing(refusals: Refusals, answers: httpx.Client) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """A server that refuses as told, one after the other, and then passes on to the real one. Tells when it was asked, and how
    much time it was given in milliseconds."""
    asked: list[tuple[float, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            asked.append((time.monotonic(), self.headers["x-request-timeout-ms"]))
            if len(asked) <= len(refusals):
                status, headers = refusals[len(asked) - 1]
                answer = b'{"code": "queue_full", "detail": "full"}'
            else:
                headers, response = {}, answers.post(self.path, content=content, headers={"content-type": "application/json"})
                status, answer = response.status_code, response.content
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_an_embedding_is_what_the_service_answers(ask: Ask, client: httpx.Client, values: dict[str, str]) -> None:
    items = [{"id": "a", **values}, {"word": "three"}]
    reply: Embeddings = ask("embed", items, representation="mean_log_var", refine={"steps": 2, "trace": True})
    raw = client.post(
        "/embed", json={"inputs": items, "representation": "mean_log_var", "refine": {"steps": 2, "trace": True}}
    ).json()
    for result, expected in zip(reply.results, raw["data"], strict=True):
        np.testing.assert_allclose(result.embedding, expected["embedding"], atol=1e-5)
        np.testing.assert_allclose(result.log_var, expected["log_var"], atol=1e-5)
        assert (result.index, result.id, list(result.modalities)) == (expected["index"], expected["id"], expected["modalities"])
        assert result.refinement is not None
        assert result.refinement.trace is not None
        assert (result.refinement.steps, len(result.refinement.trace)) == (2, 3)
    assert reply.matrix.shape == (2, 32)
    assert reply.matrix.dtype == np.float32
    assert (reply.model, reply.model_version, reply.usage) == (raw["model"], raw["model_version"], raw["usage"])
    assert len(reply.request_id) == 32


def test_files_images_and_arrays_are_the_same_picture(ask: Ask, values: dict[str, str], tmp_path: Path) -> None:
    content = base64.b64decode(values["photo"])
    (tmp_path / "photo.png").write_bytes(content)
    image = Image.open(io.BytesIO(content))
    forms = [content, tmp_path / "photo.png", image, np.asarray(image), np.asarray(image) / 255, values["photo"]]
    reply: Embeddings = ask("embed", [{"photo": form} for form in forms])
    np.testing.assert_allclose(reply.matrix, np.tile(reply.matrix[:1], (len(forms), 1)), atol=1e-5)


def test_pictures_and_texts_are_generated(ask: Ask, values: dict[str, str]) -> None:
    reply = ask("cross_generate", {"digit": values["digit"]}, num_samples=2, return_embedding=True, seed=3)
    (result,) = reply.results
    assert [type(text) for text in result.generated["word"]] == [str, str]
    assert [(image.size, image.mode) for image in result.generated["photo"]] == [((32, 32), "RGB")] * 2
    assert result.embedding.shape == (32,)
    raw = ask("cross_generate", {"digit": values["digit"]}, targets=["photo"], image="raw", num_samples=2, seed=3)
    for array, image in zip(raw.results[0].generated["photo"], result.generated["photo"], strict=True):
        assert array.shape == (3, 32, 32)
        np.testing.assert_allclose(array.transpose(1, 2, 0) * 255, np.asarray(image), atol=0.51)


def test_models_and_readiness(ask: Ask, client: httpx.Client) -> None:
    (model,) = ask("models")
    assert (model.id, model.state, model.latent) == ("digits", "ready", 32)
    assert [modality["name"] for modality in model.modalities] == ["digit", "photo", "word"]
    assert model.limits["max_items"] == 32
    assert ask("ready") is True
    assert ask("ready", to="http://127.0.0.1:1") is False
    assert ask("ready", to=f"{client.base_url}/nowhere") is False


def test_errors_are_typed_and_have_a_place(ask: Ask) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask("embed", [{"word": "one"}, {"photo": b"no picture"}])
    error = caught.value
    assert (error.status, error.code, error.pointer) == (400, "bad_image", "/inputs/1/photo")
    assert len(error.request_id) == 32
    with pytest.raises(InvalidRequestError, match="there is digits") as unknown:
        ask("embed", {"word": "one"}, model="letters")
    assert (unknown.value.status, unknown.value.code) == (404, "unknown_model")


def test_partial_replies_tell_failures_apart(ask: Ask) -> None:
    reply = ask("embed", [{"word": "one"}, {"id": "b", "word": "?"}, {"word": "two"}], on_error="partial")
    assert [result.index for result in reply.results] == [0, 2]
    (failure,) = reply.failures
    assert isinstance(failure, Failure)
    assert (failure.index, failure.id, failure.error.code, failure.error.pointer) == (1, "b", "bad_text", "/inputs/1/word")


def test_a_deadline_is_the_servers_to_tell_and_not_tried_again(ask: Ask, client: httpx.Client) -> None:
    def passed() -> float:
        counted = 'concord_rejections_total{reason="deadline_passed"}'
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counted))

    before = passed()
    with pytest.raises(DeadlineError) as caught:
        ask("embed", [{"word": "one"}] * 32, refine={"steps": 64}, timeout=0.015)
    assert caught.value.code == "deadline_passed"
    assert passed() == before + 1


def test_it_waits_as_told_and_asks_again(ask: Ask, client: httpx.Client) -> None:
    refusals: Refusals = [(503, {"retry-after": "1", "retry-after-ms": "120"}), (429, {"retry-after-ms": "60"}), (503, {})]
    with refusing(refusals, client) as (url, asked):
        assert len(ask("embed", {"word": "one"}, to=url).results) == 1
    times = [when for when, _ in asked]
    assert len(asked) == 4
    assert all(np.diff(times) > [0.12, 0.06, 0.1 * 2**2]), "never earlier than told, and later each time where nothing is told"
    given = [int(told) for _, told in asked]
    assert given[0] <= 30_000
    assert all(earlier - later >= 60 for earlier, later in itertools.pairwise(given)), "time spent is gone"


@pytest.mark.parametrize(
    ("headers", "retry", "least"),
    [({"retry-after-ms": "120", "retry-after": "1"}, 3, 0.12), ({"retry-after": "2"}, 0, 2.0), ({}, 0, 0.1), ({}, 3, 0.8),
     ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1, 0.2), ({"retry-after": "-1"}, 0, 0.1)],
)  # fmt: skip
def test_a_pause_is_never_shorter_than_told_and_half_as_long_again_at_most(
    headers: dict[str, str], retry: int, least: float
) -> None:
    pauses = [pause(httpx.Response(503, headers=headers), retry) for _ in range(100)]
    assert least <= min(pauses) < max(pauses) <= 1.5 * least


def test_it_gives_up_when_the_retries_are_spent(ask: Ask, client: httpx.Client) -> None:
    with refusing([(503, {"retry-after-ms": "1"})] * 9, client) as (url, asked):
        with pytest.raises(UnavailableError) as caught:
            ask("embed", {"word": "one"}, to=url, client={"retries": 2})
        assert (caught.value.code, len(asked)) == ("queue_full", 3)


def test_it_does_not_wait_beyond_its_timeout(ask: Ask, client: httpx.Client) -> None:
    with refusing([(503, {"retry-after": "60"})], client) as (url, asked):
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            ask("embed", {"word": "one"}, to=url, timeout=1.0)
        assert time.monotonic() - started < 20
        assert len(asked) == 1


@pytest.mark.parametrize("status", [400, 408, 413, 500, 502, 504])
def test_nothing_else_is_tried_again(ask: Ask, client: httpx.Client, status: int) -> None:
    with refusing([(status, {"retry-after-ms": "1"})], client) as (url, asked):
        with pytest.raises(Exception, match="queue_full"):
            ask("embed", {"word": "one"}, to=url)
        assert len(asked) == 1


def test_a_server_that_is_not_there_yet_is_tried_again(ask: Ask) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(httpx.ConnectError):
        ask("embed", {"word": "one"}, to=f"http://127.0.0.1:{port}", client={"retries": 1})
    assert time.monotonic() - started > 0.1


def test_a_key_and_its_quota(ask: Ask, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-key-of-a-lovelace ada 20\nthe-key-of-g-hopper grace 0.01\n")
    with serve(api_keys_file=tmp_path / "keys", max_items=2) as server:
        for key in (None, "another-key-than-ada's"):
            with pytest.raises(AccessError):
                ask("embed", {"word": "one"}, to=server.base_url, client={"key": key})
            assert ask("ready", to=server.base_url, client={"key": key})
        known = {"key": "the-key-of-a-lovelace"}
        assert ask("models", to=server.base_url, client=known)[0].id == "digits"
        started = time.monotonic()
        for _ in range(12):
            ask("embed", [{"word": "one"}] * 2, to=server.base_url, client=known)
        assert time.monotonic() - started > 0.15, "24 items at 20 a second: it was told to wait, and did"
        other = {"key": "the-key-of-g-hopper", "timeout": 5.0}
        ask("embed", [{"word": "one"}] * 2, to=server.base_url, client=other)
        with pytest.raises(UnavailableError) as caught:
            ask("embed", {"word": "one"}, to=server.base_url, client=other)
        assert (caught.value.status, caught.value.code) == (429, "quota_exceeded")
        assert caught.value.retry_after_ms


def test_one_client_serves_many_threads_and_tasks(client: httpx.Client) -> None:
    words = [f"{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(32)]
    with Client(str(client.base_url)) as own:
        alone = own.embed([{"word": word} for word in words]).matrix

        def one(number: int, into: dict[int, np.ndarray]) -> None:
            into[number] = own.embed({"word": words[number]}).matrix[0]

        found: dict[int, np.ndarray] = {}
        threads = [threading.Thread(target=one, args=(number, found)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def together() -> list[Embeddings]:
        async with AsyncClient(str(client.base_url)) as own:
            return await asyncio.gather(*(own.embed({"word": word}) for word in words))

    np.testing.assert_allclose([found[number] for number in range(32)], alone, atol=1e-5)
    np.testing.assert_allclose([reply.matrix[0] for reply in asyncio.run(together())], alone, atol=1e-5)


def test_to_import_it_costs_little() -> None:
    """Nothing of what serves comes with it."""
    script = "import sys, service.client; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not set(loaded.split()) & {
        "onnxruntime",
        "onnx",
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "PIL",
        "torch",
        "model",
    }
