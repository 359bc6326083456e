"""Load generators: open loop (requests are sent when they are due, however long the responses take) and closed loop."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.images import noise_image, to_base64

MAX_OPEN = 4000
"""Requests without a response at the same time."""
TIMEOUT_SECONDS = 60.0
IDLE_SECONDS = 30.0
"""A connection that was idle longer is not used again: the server may be closing it."""


@dataclass(frozen=True)
class TimedResponse:
    """The result of one request.

    Attributes:
        due: when the request was to be sent, in seconds on the monotonic clock.
        seconds: from ``due`` to the end of the response.
        status: None if there is no response.
        fault: why there is none: refused, reset, timeout or unsent.
    """

    due: float
    seconds: float
    status: int | None
    fault: str | None
    body: bytes


class Connections:
    """Keep-alive connections to one server, opened when they are needed. ``async with`` closes them at its end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = deque()

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, request: bytes, due: float | None = None) -> TimedResponse:
        """Send a request over an idle or a new connection, and wait for the response."""
        due = time.monotonic() if due is None else due
        status, fault, body = None, None, b""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status, body = await self._send(request)
        except ConnectionRefusedError:
            fault = "refused"
        except (OSError, EOFError):
            fault = "reset"
        except TimeoutError:
            fault = "timeout"
        return TimedResponse(due, time.monotonic() - due, status, fault, body)

    async def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await _close(self._idle.pop()[1])

    async def _send(self, request: bytes) -> tuple[int, bytes]:
        reader, writer = await self._open()
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
        except BaseException:
            await _close(writer)
            raise
        if b"connection: close" in head:
            await _close(writer)
        else:
            self._idle.append((reader, writer, time.monotonic()))
        return int(head.split(b" ", 2)[1]), body

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since = self._idle.pop()
            idle_seconds = time.monotonic() - since
            if not reader.at_eof() and not writer.is_closing() and idle_seconds < IDLE_SECONDS:
                return reader, writer
            await _close(writer)
        return await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def get(path: str) -> bytes:
    """Return a GET request."""
    return f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode()


def post(path: str, content: dict[str, Any]) -> bytes:
    """Return a POST request with a JSON body."""
    body = json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def mixed_requests(count: int = 64, steps: int = 4) -> list[bytes]:
    """Return requests of all kinds: random words, photos, both; half of them refined by ``steps``, a quarter generating."""
    requests = []
    for number in range(count):
        word = "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=5))
        photo = to_base64(noise_image(number))
        item = ({"word": word}, {"photo": photo}, {"word": word, "photo": photo})[number % 3]
        path = "/cross-generate" if number % 4 == 3 else "/embed"
        targets = {"targets": ["digit"]} if path == "/cross-generate" else {}
        requests.append(post(path, {"inputs": [item], "refine": {"steps": steps * (number % 2)}, "seed": number, **targets}))
    return requests


async def open_loop(
    connections: Connections,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    going: Callable[[], bool] = lambda: True,
    seed: int = 0,
) -> list[TimedResponse]:
    """Send requests at random moments and wait for all responses.

    Args:
        rate: requests per second on average (a Poisson process).
        seconds: length of the load.
        going: the load ends earlier when this returns False.
    """
    responses: list[TimedResponse] = []
    tasks: set[asyncio.Task[None]] = set()
    generator = random.Random(seed)
    due = time.monotonic()
    end = due + seconds
    count = 0

    async def send(request: bytes, due: float) -> None:
        responses.append(await connections.send(request, due))

    while (due := due + generator.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if not going():
            break
        if len(tasks) >= MAX_OPEN:
            responses.append(TimedResponse(due, 0.0, None, "unsent", b""))
            continue
        task = asyncio.create_task(send(requests[count % len(requests)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        count += 1
    await asyncio.gather(*tasks)
    return responses


async def closed_loop(connections: Connections, requests: Sequence[bytes], clients: int, seconds: float) -> float:
    """Return responses of status 200 per second.

    Each of ``clients`` sends its next request when it has the response to the last. After a rejection it first waits for the
    time that the response names.
    """
    end = time.monotonic() + seconds

    async def client(number: int) -> int:
        done = 0
        while time.monotonic() < end:
            response = await connections.send(requests[(number + done) % len(requests)])
            if response.status == 503:
                await asyncio.sleep(json.loads(response.body)["retry_after_ms"] / 1000)
                continue
            assert response.status == 200, response
            done += 1
        return done

    began = time.monotonic()
    counts = await asyncio.gather(*(client(number) for number in range(clients)))
    return sum(counts) / (time.monotonic() - began)


def quantiles(responses: Sequence[TimedResponse]) -> dict[str, float]:
    """Return latencies in milliseconds: p50, p99 and max."""
    if not responses:
        return {}
    milliseconds = 1000 * np.array([response.seconds for response in responses])
    return {name: round(float(np.quantile(milliseconds, q)), 2) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def count_statuses(responses: Sequence[TimedResponse]) -> dict[str, int]:
    """Return the number of responses by status, or by fault where there is no response."""
    return dict(Counter(str(response.status or response.fault) for response in responses))
