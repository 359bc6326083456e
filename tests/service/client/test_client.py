"""The clients against a live server, and against a scripted one for rejections that a live server cannot be made to send."""

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
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from concord.client.client import AsyncClient, Client, pause
from concord.client.responses import (
    AccessError,
    DeadlineError,
    Embeddings,
    Failure,
    InvalidRequestError,
    UnavailableError,
)
from tests.support.http_servers import serving
from tests.support.metrics import scrape
from tests.support.server import Serve

Call = Callable[..., Any]
Rejections = list[tuple[int, dict[str, str]]]


@pytest.fixture(params=["blocking", "asynchronous"])
def call(request: pytest.FixtureRequest, client: httpx.Client) -> Call:
    """``call("embed", ..., to=url, client={...}, **options)`` through either client, constructed with these arguments."""

    def blocking(method: str, *inputs: Any, to: Any = client.base_url, client: Any = None, **options: Any) -> Any:
        with Client(str(to), **(client or {})) as concord:
            return getattr(concord, method)(*inputs, **options)

    async def asynchronous(method: str, *inputs: Any, to: Any = client.base_url, client: Any = None, **options: Any) -> Any:
        async with AsyncClient(str(to), **(client or {})) as concord:
            response: Awaitable[Any] = getattr(concord, method)(*inputs, **options)
            return await response

    return blocking if request.param == "blocking" else lambda *args, **options: asyncio.run(asynchronous(*args, **options))


@contextlib.contextmanager
def rejecting_server(rejections: Rejections, upstream: httpx.Client) -> Iterator[tuple[str, list[tuple[float, int]]]]:
    """Run a server that sends these rejections in turn and then forwards requests to the real one.

    Args:
        rejections: status and headers of each.

    Yields:
        the URL, and for every request its time in seconds and its deadline in milliseconds.
    """
    requests: list[tuple[float, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            requests.append((time.monotonic(), int(self.headers["x-request-timeout-ms"])))
            if len(requests) <= len(rejections):
                status, headers = rejections[len(requests) - 1]
                body = b'{"code": "queue_full", "detail": "full"}'
            else:
                response = upstream.post(self.path, content=content, headers={"content-type": "application/json"})
                status, headers, body = response.status_code, {}, response.content
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with serving(Handler) as url:
        yield url, requests


def test_embed_returns_the_services_embeddings(call: Call, client: httpx.Client, values: dict[str, str]) -> None:
    items = [{"id": "a", **values}, {"word": "three"}]
    options = {"representation": "mean_log_var", "refine": {"steps": 2, "trace": True}}
    response: Embeddings = call("embed", items, **options)
    raw = client.post("/embed", json={"inputs": items, **options}).json()
    for result, expected in zip(response.results, raw["data"], strict=True):
        np.testing.assert_allclose(result.embedding, expected["embedding"], atol=1e-5)
        np.testing.assert_allclose(result.log_var, expected["log_var"], atol=1e-5)
        assert (result.index, result.id, list(result.modalities)) == (expected["index"], expected["id"], expected["modalities"])
        assert result.refinement is not None
        assert result.refinement.trace is not None
        assert (result.refinement.steps, len(result.refinement.trace)) == (2, 3)
    assert response.matrix.shape == (2, 32)
    assert response.matrix.dtype == np.float32
    assert (response.model, response.model_version, response.usage) == (raw["model"], raw["model_version"], raw["usage"])
    assert len(response.request_id) == 32


def test_embed_accepts_an_image_as_file_object_array_or_base64(call: Call, values: dict[str, str], tmp_path: Path) -> None:
    content = base64.b64decode(values["photo"])
    (tmp_path / "photo.png").write_bytes(content)
    image = Image.open(io.BytesIO(content))
    forms = [content, tmp_path / "photo.png", image, np.asarray(image), np.asarray(image) / 255, values["photo"]]
    response: Embeddings = call("embed", [{"photo": form} for form in forms])
    np.testing.assert_allclose(response.matrix, np.tile(response.matrix[:1], (len(forms), 1)), atol=1e-5)


def test_cross_generate_returns_images_and_texts(call: Call, values: dict[str, str]) -> None:
    response = call("cross_generate", {"digit": values["digit"]}, num_samples=2, return_embedding=True, seed=3)
    (result,) = response.results
    assert [type(text) for text in result.generated["word"]] == [str, str]
    assert [(image.size, image.mode) for image in result.generated["photo"]] == [((32, 32), "RGB")] * 2
    assert result.embedding.shape == (32,)
    raw = call("cross_generate", {"digit": values["digit"]}, targets=["photo"], image="raw", num_samples=2, seed=3)
    for array, image in zip(raw.results[0].generated["photo"], result.generated["photo"], strict=True):
        assert array.shape == (3, 32, 32)
        np.testing.assert_allclose(array.transpose(1, 2, 0) * 255, np.asarray(image), atol=0.51)


def test_models_and_ready_describe_the_service(call: Call, client: httpx.Client) -> None:
    (model,) = call("models")
    assert (model.id, model.state, model.latent) == ("digits", "ready", 32)
    assert [modality["name"] for modality in model.modalities] == ["digit", "photo", "word"]
    assert model.limits["max_items"] == 32
    assert call("ready") is True
    assert call("ready", to="http://127.0.0.1:1") is False
    assert call("ready", to=f"{client.base_url}/nowhere") is False


def test_invalid_request_raises_with_code_and_pointer(call: Call) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        call("embed", [{"word": "one"}, {"photo": b"no picture"}])
    error = caught.value
    assert (error.status, error.code, error.pointer) == (400, "bad_image", "/inputs/1/photo")
    assert len(error.request_id) == 32
    with pytest.raises(InvalidRequestError, match="there is digits") as unknown:
        call("embed", {"word": "one"}, model="letters")
    assert (unknown.value.status, unknown.value.code) == (404, "unknown_model")


def test_on_error_partial_separates_results_and_failures(call: Call) -> None:
    response = call("embed", [{"word": "one"}, {"id": "b", "word": "?"}, {"word": "two"}], on_error="partial")
    assert [result.index for result in response.results] == [0, 2]
    (failure,) = response.failures
    assert isinstance(failure, Failure)
    assert (failure.index, failure.id, failure.error.code, failure.error.pointer) == (1, "b", "bad_text", "/inputs/1/word")


def test_passed_deadline_raises_the_servers_error_and_is_not_retried(call: Call, client: httpx.Client) -> None:
    before = scrape(client, "concord_rejections_total", reason="deadline_passed")
    with pytest.raises(DeadlineError) as caught:
        call("embed", [{"word": "one"}] * 32, refine={"steps": 64}, timeout=0.015)
    assert caught.value.code == "deadline_passed"
    assert scrape(client, "concord_rejections_total", reason="deadline_passed") == before + 1


def test_rejected_call_is_retried_after_the_requested_wait(call: Call, client: httpx.Client) -> None:
    rejections: Rejections = [(503, {"retry-after": "1", "retry-after-ms": "120"}), (429, {"retry-after-ms": "60"}), (503, {})]
    with rejecting_server(rejections, client) as (url, requests):
        assert len(call("embed", {"word": "one"}, to=url).results) == 1
    times, deadlines = zip(*requests, strict=True)
    assert len(requests) == 4
    assert all(np.diff(times) > [0.12, 0.06, 0.1 * 2**2]), "earlier than requested, or than the exponential backoff"
    assert deadlines[0] <= 30_000
    assert all(earlier - later >= 60 for earlier, later in itertools.pairwise(deadlines)), "the deadline spans all attempts"


@pytest.mark.parametrize(
    ("headers", "retry", "least"),
    [({"retry-after-ms": "120", "retry-after": "1"}, 3, 0.12), ({"retry-after": "2"}, 0, 2.0), ({}, 0, 0.1), ({}, 3, 0.8),
     ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1, 0.2), ({"retry-after": "-1"}, 0, 0.1)],
)  # fmt: skip
def test_pause_is_at_least_the_requested_wait_and_at_most_half_longer(
    headers: dict[str, str], retry: int, least: float
) -> None:
    pauses = [pause(httpx.Response(503, headers=headers), retry) for _ in range(100)]
    assert least <= min(pauses) < max(pauses) <= 1.5 * least


def test_call_raises_when_its_retries_are_spent(call: Call, client: httpx.Client) -> None:
    with rejecting_server([(503, {"retry-after-ms": "1"})] * 9, client) as (url, requests):
        with pytest.raises(UnavailableError) as caught:
            call("embed", {"word": "one"}, to=url, client={"retries": 2})
        assert (caught.value.code, len(requests)) == ("queue_full", 3)


def test_call_does_not_wait_beyond_its_timeout(call: Call, client: httpx.Client) -> None:
    with rejecting_server([(503, {"retry-after": "60"})], client) as (url, requests):
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            call("embed", {"word": "one"}, to=url, timeout=1.0)
        assert time.monotonic() - began < 60, "it waited for the requested time"
        assert len(requests) == 1


@pytest.mark.parametrize("status", [400, 408, 413, 500, 502, 504])
def test_other_errors_are_not_retried(call: Call, client: httpx.Client, status: int) -> None:
    with rejecting_server([(status, {"retry-after-ms": "1"})], client) as (url, requests):
        with pytest.raises(Exception, match="queue_full"):
            call("embed", {"word": "one"}, to=url)
        assert len(requests) == 1


def test_refused_connection_is_retried(call: Call) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(httpx.ConnectError):
        call("embed", {"word": "one"}, to=f"http://127.0.0.1:{port}", client={"retries": 1})
    assert time.monotonic() - began > 0.1, "there was no pause"


def test_key_grants_access_and_calls_wait_for_its_quota(call: Call, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-key-of-a-lovelace ada 20\nthe-key-of-g-hopper grace 0.01\n")
    with serve(api_keys_file=tmp_path / "keys", max_items=2) as server:
        for key in (None, "another-key-than-ada's"):
            with pytest.raises(AccessError):
                call("embed", {"word": "one"}, to=server.base_url, client={"key": key})
            assert call("ready", to=server.base_url, client={"key": key})
        ada = {"key": "the-key-of-a-lovelace"}
        assert call("models", to=server.base_url, client=ada)[0].id == "digits"
        began = time.monotonic()
        for _ in range(12):
            call("embed", [{"word": "one"}] * 2, to=server.base_url, client=ada)
        assert time.monotonic() - began > 0.15, "24 items at 20 a second, after a burst of 20"
        grace = {"key": "the-key-of-g-hopper", "timeout": 5.0}
        call("embed", [{"word": "one"}] * 2, to=server.base_url, client=grace)
        with pytest.raises(UnavailableError) as caught:
            call("embed", {"word": "one"}, to=server.base_url, client=grace)
        assert (caught.value.status, caught.value.code) == (429, "quota_exceeded")
        assert caught.value.retry_after_ms


def test_client_is_shared_by_many_threads_and_tasks(client: httpx.Client) -> None:
    words = [f"{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(32)]
    embeddings: dict[int, np.ndarray] = {}
    with Client(str(client.base_url)) as concord:
        expected = concord.embed([{"word": word} for word in words]).matrix

        def embed(number: int) -> None:
            embeddings[number] = concord.embed({"word": words[number]}).matrix[0]

        threads = [threading.Thread(target=embed, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def embed_all() -> list[Embeddings]:
        async with AsyncClient(str(client.base_url)) as concord:
            return await asyncio.gather(*(concord.embed({"word": word}) for word in words))

    np.testing.assert_allclose([embeddings[number] for number in range(32)], expected, atol=1e-5)
    np.testing.assert_allclose([response.matrix[0] for response in asyncio.run(embed_all())], expected, atol=1e-5)


def test_import_of_the_client_loads_nothing_of_the_server() -> None:
    packages = {"onnxruntime", "onnx", "fastapi", "starlette", "uvicorn", "pydantic", "PIL", "torch"}
    script = "import sys, concord.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    modules = loaded.split()
    assert "concord.client.client" in modules
    assert not packages & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith(("concord.model", "concord.service", "concord.training"))]
