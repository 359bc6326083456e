"""Requests that do not fit are rejected as soon as their headers arrive. The connection stays usable."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import structlog

from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.http import admission
from concord.service.settings import Settings
from tests.support.metrics import scrape
from tests.support.raw_http import connect, head, read_response
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import wait_for

BODY = orjson.dumps({"inputs": [{"word": "one"}]})
KEY = "of-a-client-that-pays"
PATHS = ("/embed", "/cross-generate", "/v1/embeddings")


@contextlib.contextmanager
def full_server(serve: Serve, runtime: Runtime, **settings: Any) -> Iterator[httpx.Client]:
    """A server whose two queue places are taken inside this context."""
    gated = GatedRuntime(runtime.bundle, threads=1)
    with serve(gated, max_queue_items=2, max_items=2, **settings) as client, ThreadPoolExecutor(1) as pool:
        gated.close()
        key = {"Authorization": f"Bearer {KEY}"}
        held_request = pool.submit(client.post, "/embed", json={"inputs": [{"word": "one"}] * 2}, headers=key)
        try:
            gated.wait_until_entered()
            yield client
        finally:
            gated.open()
            assert held_request.result().status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_rejection_has_the_headers_and_metrics_of_a_response(serve: Serve, runtime: Runtime, path: str) -> None:
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    with full_server(serve, runtime) as client:
        before = scrape(client, "concord_rejections_total", reason="queue_full")
        for _ in range(3):
            response = client.post(path, content=BODY, headers={"X-Request-Id": "mine", "traceparent": trace})
            error = response.json().get("error", response.json())  # validated against the OpenAPI document
            assert (response.status_code, error["code"]) == (503, "queue_full")
            assert int(response.headers["retry-after"]) * 1000 >= int(response.headers["retry-after-ms"]) > 0
            assert (response.headers["x-request-id"], response.headers["traceparent"]) == ("mine", trace)
            assert response.headers["x-model-version"] == runtime.bundle.manifest.version
            assert "date" in response.headers
        assert scrape(client, "concord_rejections_total", reason="queue_full") == before + 3
        assert scrape(client, "concord_request_duration_seconds_count", route=path, status="503") == 3
        new_id = client.post(path, content=BODY, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
        assert len(new_id) == 32


def test_other_routes_are_served_while_the_queue_is_full(serve: Serve, runtime: Runtime) -> None:
    with full_server(serve, runtime) as client:
        assert client.get("/livez").status_code == client.get("/v1/models").status_code == 200
        assert client.get("/embed").status_code == 405
        assert client.post("/nowhere").status_code == 404


def test_full_queue_rejects_before_the_key_is_checked(serve: Serve, runtime: Runtime, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with full_server(serve, runtime, api_keys_file=keys) as client:
        assert client.post("/embed", content=BODY).status_code == 503
    with serve(api_keys_file=keys) as client:
        assert client.post("/embed", content=BODY).status_code == 401


def test_rejection_is_sent_before_the_body_which_is_discarded(serve: Serve, runtime: Runtime) -> None:
    with full_server(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        for size in (len(BODY), 300_000):
            connection.sendall(head("/embed?refine.steps=1", size))
            assert read_response(file)[0] == 503
            connection.sendall(bytes(size))
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_response(file)[0] == 200


def test_rejection_closes_a_connection_that_asks_for_it(serve: Serve, runtime: Runtime) -> None:
    with full_server(serve, runtime) as client:
        with connect(client) as connection, connection.makefile("rb") as file:
            connection.sendall(head("/embed", len(BODY), "connection: close") + BODY)
            status, headers, _ = read_response(file)
            assert (status, headers["connection"], file.read()) == (503, "close", b"")
        with connect(client) as connection, connection.makefile("rb") as file:  # the server waits for the body: no reset
            connection.sendall(head("/embed", len(BODY), "connection: close"))
            assert read_response(file)[0] == 503
            connection.sendall(BODY)
            assert file.read() == b""


def test_client_that_expects_continue_is_rejected_without_its_body(serve: Serve, runtime: Runtime) -> None:
    with full_server(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(head("/embed", len(BODY), "expect: 100-continue"))
        assert read_response(file)[0] == 503


def test_pipelined_responses_keep_the_order_of_requests(serve: Serve, runtime: Runtime) -> None:
    with full_server(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        livez = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
        rejected = head("/embed", len(BODY)) + BODY
        connection.sendall(livez + rejected + rejected + livez + rejected)
        assert [read_response(file)[0] for _ in range(5)] == [200, 503, 503, 200, 503]


def test_client_that_reads_nothing_gets_a_bounded_number_of_rejections(serve: Serve, runtime: Runtime) -> None:
    """The server stops responding when the connection's buffers are full."""
    with full_server(serve, runtime) as client, connect(client, seconds=1) as connection:
        with contextlib.suppress(TimeoutError):
            for _ in range(1000):
                connection.sendall((head("/embed", len(BODY)) + BODY) * 100)
        assert scrape(client, "concord_rejections_total", reason="queue_full") < 50_000


def test_rejections_within_log_seconds_share_one_log_line(
    serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_seconds = 0.3
    monkeypatch.setattr(admission, "LOG_SECONDS", log_seconds)
    lines: list[dict[str, Any]] = []

    def listen(_logger: object, _name: str, event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "rejected":
            lines.append(event)
        raise structlog.DropEvent

    with full_server(serve, runtime) as client:
        structlog.configure(processors=[listen])
        try:
            began = time.monotonic()
            for _ in range(20):
                assert client.post("/embed", content=BODY).status_code == 503
            wait_for(lambda: sum(line["requests"] for line in lines) == 20)
            assert len(lines) <= 1 + (time.monotonic() - began) / log_seconds
        finally:
            structlog.reset_defaults()
    assert {line["code"] for line in lines} == {"queue_full"}


def test_requests_of_one_loop_iteration_count_against_capacity(runtime: Runtime) -> None:
    """No request is queued or being parsed yet when the last one arrives."""

    async def test() -> None:
        app = create([runtime], Settings(max_queue_items=4, max_items=4))
        async with app.router.lifespan_context(app):
            for _ in range(2):
                rejections = [app.state.admission.reject(b"POST", b"/embed", []) for _ in range(6)]
                assert [rejection and rejection.status_code for rejection in rejections] == [None, None, None, None, 503, 503]
                for _ in range(3):
                    await asyncio.sleep(0)

    asyncio.run(test())
