"""What cannot be taken is refused at the head of its request, and the connection goes on."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import structlog

from model.runtime import Posterior, Runtime
from service import door
from service.app import create
from service.settings import Settings
from tests.service.test_telemetry import scrape

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
BODY = orjson.dumps({"inputs": [{"word": "one"}]})
KEY = "of-a-client-that-pays"
CALLS = ("/embed", "/cross-generate", "/v1/embeddings")


class Held(Runtime):
    """The real graphs, which answer when a test lets them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free, self.entered = threading.Event(), threading.Event()
        self.free.set()

    def encode(self, *args: Any) -> Posterior:
        self.entered.set()
        assert self.free.wait(20)
        return super().encode(*args)


@contextlib.contextmanager
def full(serve: Serve, runtime: Runtime, **settings: Any) -> Iterator[httpx.Client]:
    """A server whose two places are taken, to the end."""
    held = Held(runtime.bundle, threads=1)
    with serve(held, max_queue_items=2, max_items=2, **settings) as client, ThreadPoolExecutor(1) as pool:
        held.free.clear()
        held.entered.clear()
        key = {"Authorization": f"Bearer {KEY}"}
        asked = pool.submit(client.post, "/embed", json={"inputs": [{"word": "one"}] * 2}, headers=key)
        try:
            assert held.entered.wait(20)
            yield client
        finally:
            held.free.set()
            assert asked.result(20).status_code == 200


def head(path: str, *more: str, size: int = len(BODY)) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {size}", *more, "", ""]
    return "\r\n".join(lines).encode()


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def read(file: Any) -> tuple[int, dict[str, str], bytes]:
    """One answer: status, headers, body."""
    status = int(file.readline().split()[1])
    lines = iter(file.readline, b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.decode().partition(":") for line in lines)}
    return status, headers, file.read(int(headers["content-length"]))


@pytest.mark.parametrize("path", CALLS)
def test_the_answer_is_whole(serve: Serve, runtime: Runtime, path: str) -> None:
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    with full(serve, runtime) as client:
        before = scrape(client, "concord_rejections_total", reason="queue_full")
        for _ in range(3):
            answer = client.post(path, content=BODY, headers={"X-Request-Id": "mine", "traceparent": trace})
            told = answer.json().get("error", answer.json())  # held against the document
            assert (answer.status_code, told["code"]) == (503, "queue_full")
            assert int(answer.headers["retry-after"]) * 1000 >= int(answer.headers["retry-after-ms"]) > 0
            assert (answer.headers["x-request-id"], answer.headers["traceparent"]) == ("mine", trace)
            assert answer.headers["x-model-version"] == runtime.bundle.manifest.version
            assert "date" in answer.headers
        assert scrape(client, "concord_rejections_total", reason="queue_full") == before + 3
        assert scrape(client, "concord_request_duration_seconds_count", route=path, status="503") == 3
        made = client.post(path, content=BODY, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
        assert len(made) == 32


def test_everything_else_goes_in(serve: Serve, runtime: Runtime) -> None:
    with full(serve, runtime) as client:
        assert client.get("/livez").status_code == client.get("/v1/models").status_code == 200
        assert client.get("/embed").status_code == 405
        assert client.post("/nowhere").status_code == 404


def test_no_key_is_asked_for_while_all_are_refused(serve: Serve, runtime: Runtime, tmp_path: Path) -> None:
    """To look at a request is what there is no time for."""
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with full(serve, runtime, api_keys_file=keys) as client:
        assert client.post("/embed", content=BODY).status_code == 503
    with serve(api_keys_file=keys) as client:
        assert client.post("/embed", content=BODY).status_code == 401


def test_the_answer_comes_before_the_body_which_leads_nowhere(serve: Serve, runtime: Runtime) -> None:
    with full(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        for size in (len(BODY), 300_000):
            connection.sendall(head("/embed?refine.steps=1", size=size))
            assert read(file)[0] == 503
            connection.sendall(bytes(size))
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read(file)[0] == 200


def test_a_connection_that_is_to_be_closed_is(serve: Serve, runtime: Runtime) -> None:
    with full(serve, runtime) as client:
        with connect(client) as connection, connection.makefile("rb") as file:
            connection.sendall(head("/embed", "connection: close") + BODY)
            status, headers, _ = read(file)
            assert (status, headers["connection"], file.read()) == (503, "close", b"")
        with connect(client) as connection, connection.makefile("rb") as file:  # its body is waited for, so that it is no reset
            connection.sendall(head("/embed", "connection: close"))
            assert read(file)[0] == 503
            connection.sendall(BODY)
            assert file.read() == b""


def test_a_client_that_waits_for_continue_never_sends_its_body(serve: Serve, runtime: Runtime) -> None:
    with full(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(head("/embed", "expect: 100-continue"))
        assert read(file)[0] == 503


def test_answers_stand_in_the_order_of_their_requests(serve: Serve, runtime: Runtime) -> None:
    with full(serve, runtime) as client, connect(client) as connection, connection.makefile("rb") as file:
        livez = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
        refused = head("/embed") + BODY
        connection.sendall(livez + refused + refused + livez + refused)
        assert [read(file)[0] for _ in range(5)] == [200, 503, 503, 200, 503]


def test_who_takes_in_no_answers_is_not_answered_for_ever(serve: Serve, runtime: Runtime) -> None:
    """What is sent and not read stays in the connection, of which the server holds a bounded part."""
    with full(serve, runtime) as client, connect(client) as connection:
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(1000):
                connection.sendall((head("/embed") + BODY) * 100)
        assert scrape(client, "concord_rejections_total", reason="queue_full") < 50_000


def test_many_refusals_are_one_line_of_the_log(serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "TELL_SECONDS", 0.3)
    told = threading.Event()

    def listen(_logger: object, _name: str, event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "refused":
            lines.append(event)
            told.set()
        raise structlog.DropEvent

    lines: list[dict[str, Any]] = []
    with full(serve, runtime) as client:
        structlog.configure(processors=[listen])
        try:
            for _ in range(20):
                assert client.post("/embed", content=BODY).status_code == 503
            assert told.wait(10)
        finally:
            structlog.reset_defaults()
    assert (lines[0]["requests"], lines[0]["code"]) == (20, "queue_full")


def test_those_that_come_in_one_turn_of_the_loop_are_counted(runtime: Runtime) -> None:
    """None of them is in the queue yet, nor being decoded, when the last one comes."""

    async def test() -> None:
        app = create([runtime], Settings(max_queue_items=4, max_items=4))
        async with app.router.lifespan_context(app):
            for _ in range(2):
                answers = [app.state.door.refusal(b"POST", b"/embed", []) for _ in range(6)]
                assert [answer and answer.status_code for answer in answers] == [None, None, None, None, 503, 503]
                for _ in range(3):
                    await asyncio.sleep(0)

    asyncio.run(test())
