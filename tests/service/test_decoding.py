"""Pictures are decoded beside the event loop, by few threads, for those who still wait."""

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson
import pytest

from service.calls import SlowError
from service.decoding import QUICK_BYTES, Decoding
from service.telemetry import Metrics
from tests.attacks import png

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
LARGE = base64.b64encode(png(width=4000, height=4000)).decode()
"""As many pixels as are allowed, in a small file: a fraction of a second each."""
SMALL = {"inputs": [{"photo": base64.b64encode(png()).decode()}]}


def large(count: int) -> dict[str, Any]:
    return {"inputs": [{"photo": LARGE}] * count}


@pytest.fixture
def client(serve: Serve) -> Iterator[httpx.Client]:
    """One decode thread: what it decodes for nobody would come before all that is asked later."""
    with serve(decode_threads=1, max_queue_items=32) as client:
        yield client


def cost(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds of the processor, which say more than the clock where other things run too."""
    began = time.process_time()
    assert client.post("/embed", json=body).status_code == 200
    return time.process_time() - began


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_a_deadline_ends_the_decoding(client: httpx.Client, path: str) -> None:
    one = cost(client, large(1))
    body = {"input" if path.startswith("/v1") else "inputs": large(32)["inputs"]}
    began = time.process_time()
    assert client.post(path, json=body, headers={"X-Request-Timeout-Ms": "50"}).status_code == 504
    cost(client, SMALL)
    assert time.process_time() - began < 10 * one, "not all of the 32"


def test_so_does_a_client_that_leaves(client: httpx.Client) -> None:
    one = cost(client, large(1))
    body = orjson.dumps(large(32))
    head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    began = time.process_time()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head + body)
        time.sleep(0.05)
    cost(client, SMALL)
    assert time.process_time() - began < 10 * one


def test_what_waits_to_be_decoded_is_bounded_and_told_when_to_come_back(serve: Serve) -> None:
    with serve(decode_threads=1, max_queue_items=2, max_items=2) as client, ThreadPoolExecutor(6) as pool:
        cost(client, SMALL)
        answers = list(pool.map(lambda _: client.post("/embed", json=large(2)), range(6)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(refused) >= 2, "two are held, and more were sent before one was done"
        assert {(answer.json()["code"], int(answer.headers["retry-after"]) >= 1) for answer in refused} == {
            ("queue_full", True)
        }
        assert any("decoded" in answer.json()["detail"] for answer in refused), "and not only at the queue behind"
        cost(client, SMALL)


def test_the_event_loop_turns_meanwhile(client: httpx.Client) -> None:
    asked = threading.Thread(target=client.post, args=("/embed",), kwargs={"json": large(8)})
    asked.start()
    answered = 0
    while asked.is_alive():
        assert client.get("/livez").status_code == 200
        answered += 1
    assert answered > 20


@pytest.mark.parametrize(("size", "quick"), [(QUICK_BYTES, True), (QUICK_BYTES + 1, False)])
@pytest.mark.parametrize("slow", [False, True])
def test_a_small_body_is_read_on_the_event_loop_unless_that_takes_long(size: int, quick: bool, slow: bool) -> None:
    where: list[tuple[bool, bool]] = []

    def read(wanted: Callable[[], bool], quickly: bool) -> str:
        assert wanted()
        where.append((quickly, threading.current_thread() is threading.main_thread()))
        if quickly and slow:
            raise SlowError
        return "read"

    async def test() -> None:
        decoding = Decoding(1, 8, Metrics({}))
        answer, seconds = await decoding.decode(read, size)
        assert (answer, decoding.held) == ("read", 0)
        assert seconds >= 0
        decoding.stop()

    asyncio.run(test())
    assert where == [(True, True)] * quick + [(False, False)] * (slow or not quick)
