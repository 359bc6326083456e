"""Time limits of connections, invalid HTTP, and clients that leave, over real sockets."""

import contextlib
import itertools
import json
import select
import socket
import struct
import time
from pathlib import Path

import httpx
import orjson
import pytest

from concord.model.runtime import Runtime
from concord.service.http import server
from concord.service.http.server import bind
from tests.support.metrics import scrape
from tests.support.raw_http import connect, head, read_all, send_raw
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import SECONDS, wait_for

LIVEZ = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "bad_request"),
        (
            b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "bad_request",
        ),
        (b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400, "bad_request"),
        (b"GET /livez HTTP/1.1\r\nhost : x\r\n\r\n", 400, "bad_request"),
        (b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
    ],
)
def test_invalid_http_gets_a_problem_object(client: httpx.Client, content: bytes, status: int, code: str) -> None:
    response_head, _, body = send_raw(client, content).partition(b"\r\n\r\n")
    assert response_head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in response_head
    assert (json.loads(body)["status"], json.loads(body)["code"]) == (status, code)


def test_bind_to_a_port_in_use_raises() -> None:
    first = bind("127.0.0.1", 0)
    first.listen()
    with first, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def send_slowly(connection: socket.socket, content: bytes) -> None:
    """Send a byte at a time, in a circle, until the server responds or closes the connection.

    Raises:
        AssertionError: it does neither for a long time.
    """
    end = time.monotonic() + SECONDS
    for byte in itertools.cycle(content):
        try:
            connection.sendall(bytes([byte]))
        except ConnectionError:
            return
        readable, _, _ = select.select([connection], [], [], 0.02)
        if readable:
            return
        assert time.monotonic() < end, "the server lets the client send for ever"


def test_slow_headers_get_408_and_the_connection_is_closed(serve: Serve) -> None:
    with serve(head_timeout_ms=400) as client:
        began = time.monotonic()  # the server starts to count as it accepts the connection
        with connect(client) as connection:
            send_slowly(connection, b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 500)
            received = read_all(connection)
        assert time.monotonic() - began > 0.4
        assert received.startswith(b"HTTP/1.1 408 ")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == "request_timeout"


def test_pipelined_requests_do_not_count_as_one_long_head(client: httpx.Client) -> None:
    """They arrive in parts that start and end inside heads. Together they are longer than a head may be."""
    request = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 8000 + b"\r\n\r\n"
    received = b""
    with connect(client) as connection:

        def receive(responses: int) -> None:
            nonlocal received
            while received.count(b"HTTP/1.1 200 ") < responses:
                chunk = connection.recv(65536)
                assert chunk, received[-1000:]
                received += chunk

        connection.sendall(request + request[:4000])
        receive(1)  # the server has read the start of the second head
        connection.sendall((request * 60)[4000:-4000])
        receive(60)
        connection.sendall(request[-4000:].replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        received += read_all(connection)
    assert received.count(b"HTTP/1.1 200 ") == received.count(b"HTTP/1.1 ") == 61


def test_silent_connection_is_closed(serve: Serve) -> None:
    with serve(head_timeout_ms=300) as client, connect(client) as connection:
        assert connection.recv(1) == b""


def test_each_request_of_a_connection_has_its_own_head_timeout(serve: Serve) -> None:
    with serve(head_timeout_ms=1000) as client, connect(client) as connection:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:  # together longer than one head may take
            connection.sendall(LIVEZ)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.1)
        connection.sendall(b"GET /livez HTTP")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_body_without_an_end_gets_504_and_the_connection_is_closed(serve: Serve) -> None:
    with serve(request_timeout_ms=400) as client, connect(client) as connection:
        connection.sendall(head("/embed", 100_000))
        send_slowly(connection, b" ")
        assert connection.recv(12) == b"HTTP/1.1 504"
        end = time.monotonic() + SECONDS
        with contextlib.suppress(ConnectionError):
            while True:
                connection.sendall(b" ")
                readable, _, _ = select.select([connection], [], [], 0.02)
                if readable and not connection.recv(65536):
                    break
                assert time.monotonic() < end, "the server lets the client send for ever"


def test_client_that_does_not_read_its_response_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_MS", 1000)
    with serve() as client:
        large = orjson.dumps(
            {"inputs": [{"word": "one"}] * 8, "num_samples": 16, "output": {"image": "raw"}, "targets": ["photo", "digit"]}
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(SECONDS)
        connection.connect((client.base_url.host, client.base_url.port))
        with connection:
            ports = (client.base_url.port, connection.getsockname()[1])
            connection.sendall(head("/cross-generate", len(large)) + large)
            labels = {"route": "/cross-generate", "status": "200"}
            wait_for(lambda: scrape(client, "concord_request_duration_seconds_count", **labels) == 1)
            assert tcp_connection_exists(*ports)
            wait_for(lambda: not tcp_connection_exists(*ports), message="the kernel keeps the connection")
            with pytest.raises(ConnectionError):  # the rest of the response is lost
                read_all(connection)


def tcp_connection_exists(local_port: int, remote_port: int) -> bool:
    """Return whether the kernel has this connection, seen from the local end."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any((int(row[1][-4:], 16), int(row[2][-4:], 16)) == (local_port, remote_port) for row in rows)


def test_bodies_in_progress_are_limited_together(serve: Serve) -> None:
    size = 600_000
    with serve(max_body_bytes=1 << 20, max_bodies_bytes=1 << 20) as client, connect(client) as slow:
        slow.sendall(head("/embed", size) + bytes(size - 1))
        body = {"inputs": [{"word": "one"}], "padding": "x" * size}

        def rejected() -> httpx.Response | None:
            response = client.post("/embed", json=body)
            return response if response.status_code == 503 else None

        response = wait_for(rejected)  # once the server has read the slow body
        assert response is not None
        assert response.json()["code"] == "queue_full"
        assert response.json()["retry_after_ms"] > 0
        assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200, "small bodies fit"
        slow.close()
        wait_for(lambda: client.post("/embed", json=body).status_code == 422)


@pytest.mark.parametrize("stage", ["upload", "queued", "refining", "refining before another request"])
def test_jobs_of_disconnected_clients_are_dropped(serve: Serve, runtime: Runtime, stage: str) -> None:
    """Connections are closed or reset, many times, at one stage of a request. Each is counted, and no job stays."""
    rounds = 30
    body = orjson.dumps({"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64 if "refining" in stage else 0}})
    request = head("/embed", len(body)) + (body[:-1] if stage == "upload" else body)
    if "another" in stage:  # the second request is pipelined: it waits for the first
        request += LIVEZ
    gated = GatedRuntime(runtime.bundle, threads=1)
    with serve(gated) as client, contextlib.ExitStack() as stack:
        engine = client.app.state.registry.choose(None).engine  # type: ignore[attr-defined]

        def disconnected() -> float:
            return scrape(client, "concord_rejections_total", reason="client_gone")

        if stage == "queued":
            gated.close()
            stack.callback(gated.open)
            blocker = stack.enter_context(connect(client))
            blocker.sendall(head("/embed", 29) + b'{"inputs": [{"word": "one"}]}')
            gated.wait_until_entered()
        for number in range(rounds):
            if "refining" in stage:
                gated.close(gated.refine_gate)
            steps_before = gated.steps
            connection = connect(client)
            connection.sendall(request)
            if stage == "upload":
                wait_for(lambda: scrape(client, "concord_requests_in_flight") == 2)  # the other one is the scrape
            elif stage == "queued":
                wait_for(lambda: engine.queue_depth == 32)
            else:
                wait_for(lambda steps_before=steps_before: gated.steps > steps_before)  # type: ignore[misc]
            if number % 2:  # a reset instead of a close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            wait_for(lambda number=number: disconnected() == number + 1)  # type: ignore[misc]
            assert len(engine._owners) == (1 if stage == "queued" else 0), "jobs of the client are still held"
            if stage != "queued":
                gated.open()
        gated.open()
        wait_for(lambda: not engine._owners)
        wait_for(lambda: scrape(client, "concord_requests_in_flight") == 1)
        assert disconnected() == rounds
        assert engine.queue_depth == 0
        assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200
