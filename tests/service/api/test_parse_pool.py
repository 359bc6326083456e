"""Bodies are parsed in a few threads next to the event loop, only for clients that still wait."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson
import pytest

from concord.service.api.requests import INLINE_BYTES, RequestParser, WouldBlock
from tests.support.hostile_files import black_png
from tests.support.images import to_base64
from tests.support.raw_http import connect, head
from tests.support.server import Serve
from tests.support.waiting import wait_for

LARGE = to_base64(black_png(width=4000, height=4000))
"""The most pixels that are allowed, in a small file: a fraction of a second each."""
SMALL = {"inputs": [{"photo": to_base64(black_png())}]}


def large(count: int) -> dict[str, Any]:
    return {"inputs": [{"photo": LARGE}] * count}


@pytest.fixture
def client(serve: Serve) -> Iterator[httpx.Client]:
    """One parse thread: if it parsed for a client that has left, every later request would wait."""
    with serve(decode_threads=1, max_queue_items=32) as client:
        yield client


def cost(client: httpx.Client, body: dict[str, Any]) -> float:
    """Return the processor seconds of one request, which do not depend on other load of the machine."""
    began = time.process_time()
    assert client.post("/embed", json=body).status_code == 200
    return time.process_time() - began


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_passed_deadline_ends_the_parsing(client: httpx.Client, path: str) -> None:
    one_image = cost(client, large(1))
    body = {"input" if path.startswith("/v1") else "inputs": large(32)["inputs"]}
    began = time.process_time()
    assert client.post(path, json=body, headers={"X-Request-Timeout-Ms": "50"}).status_code == 504
    cost(client, SMALL)
    assert time.process_time() - began < 10 * one_image, "all 32 items were parsed"


def test_disconnect_ends_the_parsing(client: httpx.Client) -> None:
    one_image = cost(client, large(1))
    body = orjson.dumps(large(32))
    pool = client.app.state.parse_pool  # type: ignore[attr-defined]
    began = time.process_time()
    with connect(client) as connection:
        connection.sendall(head("/embed", len(body)) + body)
        wait_for(lambda: pool.pending, interval=0.001)
    cost(client, SMALL)
    assert time.process_time() - began < 10 * one_image, "all 32 items were parsed"


def test_requests_that_wait_to_be_parsed_are_bounded(serve: Serve) -> None:
    with serve(decode_threads=1, max_queue_items=2, max_items=2) as client, ThreadPoolExecutor(2) as threads:
        pool = client.app.state.parse_pool  # type: ignore[attr-defined]
        release = threading.Event()
        pool._threads.submit(release.wait)  # occupies the only parse thread
        held = []
        try:
            for count in (1, 2):
                held.append(threads.submit(client.post, "/embed", json=large(1)))
                wait_for(lambda count=count: pool.pending == count)  # type: ignore[misc]
            for _ in range(4):
                rejected = client.post("/embed", json=large(2))
                assert (rejected.status_code, rejected.json()["code"]) == (503, "queue_full")
                assert int(rejected.headers["retry-after"]) >= 1
                assert "parsed" in rejected.json()["detail"], "the inference queue was full"
        finally:
            release.set()
        assert [response.result().status_code for response in held] == [200, 200]
        cost(client, SMALL)


def test_event_loop_responds_while_a_body_is_parsed(client: httpx.Client) -> None:
    request = threading.Thread(target=client.post, args=("/embed",), kwargs={"json": large(8)})
    request.start()
    responses = 0
    while request.is_alive():
        assert client.get("/livez").status_code == 200
        responses += 1
    assert responses > 20


@pytest.mark.parametrize(("size", "inline"), [(INLINE_BYTES, True), (INLINE_BYTES + 1, False)])
@pytest.mark.parametrize("slow", [False, True])
def test_small_body_is_parsed_on_the_event_loop_unless_that_would_block(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, size: int, inline: bool, slow: bool
) -> None:
    calls: list[tuple[bool, bool]] = []
    parse_items = RequestParser.parse_items

    def recorded(*args: Any, allow_blocking: bool, **kwargs: Any) -> Any:
        calls.append((allow_blocking, threading.current_thread().name.startswith("parse")))
        if slow and not allow_blocking:
            raise WouldBlock
        return parse_items(*args, allow_blocking=allow_blocking, **kwargs)

    monkeypatch.setattr(RequestParser, "parse_items", recorded)
    body = orjson.dumps({"inputs": [{"word": "one"}]})
    with serve() as client:
        response = client.post("/embed", content=body.ljust(size), headers={"content-type": "application/json"})
        assert response.status_code == 200
        assert client.app.state.parse_pool.pending == 0  # type: ignore[attr-defined]
    assert calls == [(False, False)] * inline + [(True, True)] * (slow or not inline)
