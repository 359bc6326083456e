import contextlib
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest

from model.runtime import Runtime
from service import server
from service.server import bind

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
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
def test_what_reaches_no_route_gets_a_problem_too(client: httpx.Client, sent: bytes, status: int, code: str) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    assert (json.loads(body)["status"], json.loads(body)["code"]) == (status, code)


def test_a_port_is_taken_once() -> None:
    first = bind("127.0.0.1", 0)
    first.listen()
    with first, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def head(size: int, *more: str) -> bytes:
    lines = ["POST /embed HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {size}", *more, "", ""]
    return "\r\n".join(lines).encode()


def drip(connection: socket.socket, content: bytes, seconds: float) -> float:
    """A byte at a time, until the other side has had enough. How long that took."""
    started = time.monotonic()
    connection.settimeout(0.02)
    for byte in itertools.cycle(content):
        if time.monotonic() - started > seconds:
            break
        with contextlib.suppress(TimeoutError):
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(1, socket.MSG_PEEK) == b"":
                    break
                time.sleep(0.02)
            except ConnectionError:
                break
    return time.monotonic() - started


def read_all(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def counted(client: httpx.Client, line: str) -> float:
    found = [own for own in client.get("/metrics").text.splitlines() if own.startswith(f"{line} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "this never came true"
        time.sleep(0.01)


def test_headers_that_take_too_long_are_cut(serve: Serve) -> None:
    with serve(head_timeout_ms=400) as client, connect(client) as connection:
        started = time.monotonic()
        assert drip(connection, b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 500, 5) < 5
        connection.settimeout(20)
        received = b"".join(iter(lambda: connection.recv(4096), b""))
        assert 0.3 < time.monotonic() - started < 2
        assert received.startswith(b"HTTP/1.1 408 ")
        assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == "request_timeout"


def test_requests_sent_far_ahead_are_no_long_head(client: httpx.Client) -> None:
    """They arrive in parts that begin and end within heads, and together are longer than a head may be."""
    request = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 8000 + b"\r\n\r\n"
    with connect(client) as connection:
        connection.sendall(request[:4000])
        time.sleep(0.05)
        connection.sendall((request * 60)[4000:-4000])
        time.sleep(0.05)
        connection.sendall(request[-4000:].replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 ") == 60


def test_a_connection_that_says_nothing_is_closed(serve: Serve) -> None:
    with serve(head_timeout_ms=300) as client, connect(client) as connection:
        assert connection.recv(1) == b""


def test_a_second_request_has_its_own_time_for_headers(serve: Serve) -> None:
    with serve(head_timeout_ms=400) as client, connect(client) as connection:
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.3)  # together longer than one may take
        connection.sendall(b"GET /livez HTTP")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_never_ends_is_answered_and_cut(serve: Serve) -> None:
    with serve(request_timeout_ms=400) as client, connect(client) as connection:
        connection.sendall(head(100_000))
        taken = drip(connection, b" ", 0.9)
        connection.settimeout(20)
        assert connection.recv(12) == b"HTTP/1.1 504"
        assert taken < 1.5
        started = time.monotonic()
        drip(connection, b" ", 5)
        with contextlib.suppress(ConnectionError):
            read_all(connection)
        assert time.monotonic() - started < 3, "nobody is allowed to go on for ever"


def test_who_does_not_read_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNREAD_MS", 1000)
    with serve() as client:
        large = orjson.dumps(
            {"inputs": [{"word": "one"}] * 8, "num_samples": 16, "output": {"image": "raw"}, "targets": ["photo", "digit"]}
        )
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((client.base_url.host, client.base_url.port))
        with connection:
            connection.sendall(head(len(large)).replace(b"/embed", b"/cross-generate") + large)
            answered = 'concord_request_duration_seconds_count{route="/cross-generate",status="200"}'
            wait_for(lambda: counted(client, answered) == 1)
            time.sleep(4)
            with pytest.raises(ConnectionError):  # the rest of the answer is gone
                read_all(connection)


def test_bodies_under_way_are_bounded_together(serve: Serve) -> None:
    size = 600_000
    with serve(max_body_bytes=1 << 20, max_bodies_bytes=1 << 20) as client, connect(client) as slow:
        slow.sendall(head(size) + bytes(size - 1))
        time.sleep(0.3)
        body = {"inputs": [{"word": "one"}], "padding": "x" * size}
        refused = client.post("/embed", json=body)
        assert (refused.status_code, refused.json()["code"]) == (503, "queue_full")
        assert refused.json()["retry_after_ms"] > 0
        assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200, "small ones fit"
        slow.close()
        wait_for(lambda: client.post("/embed", json=body).status_code == 422)


GONE = 'concord_rejections_total{reason="client_gone"}'


@pytest.mark.parametrize("stage", ["upload", "queued", "refining", "refining before another request"])
def test_work_of_clients_that_left_is_dropped(serve: Serve, runtime: Runtime, stage: str) -> None:
    """Closed and reset, many times: each is counted, nothing stays."""
    word = orjson.dumps({"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64 if "refining" in stage else 0}})
    request = head(len(word)) + (word[:-1] if stage == "upload" else word)
    if "another" in stage:  # sent ahead, it waits for the first to be answered
        request += b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"

    class Slow(Runtime):
        def encode(self, *args: Any) -> Any:
            time.sleep(0.02 if stage == "queued" else 0)
            return super().encode(*args)

    with serve(Slow(runtime.bundle, threads=1), max_queue_items=2000, max_queue_ms=600_000) as client:  # none is refused
        rounds = 30
        for number in range(rounds):
            connection = connect(client)
            connection.sendall(request)
            time.sleep(0.01)
            if number % 2:  # a reset instead of a close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        wait_for(lambda: counted(client, "concord_queue_depth") == 0)
        wait_for(lambda: counted(client, "concord_requests_in_flight") == 1, 20)  # this one
        answered = counted(client, 'concord_request_duration_seconds_count{route="/embed",status="200"}')
        assert counted(client, GONE) + answered == rounds
        assert counted(client, GONE) >= rounds * (0.3 if stage == "queued" else 0.9)
        engine = client.app.state.bundles.choose(None).engine  # type: ignore[attr-defined]
        assert not engine._owners
        assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200
