"""Open-loop traffic: requests are sent when they are due, however slowly they are answered, and timed from that moment."""

import asyncio
import base64
import contextlib
import io
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MOST_OPEN = 4000
TIMEOUT_SECONDS = 60.0
IDLE_SECONDS = 30.0
"""A connection that rested longer is not used again: the server might just be closing it."""
SEVEN = {"inputs": [{"word": "seven"}]}


@dataclass(frozen=True)
class Answer:
    """``seconds`` since the request was due. Without a status there is a fault: refused, reset, timeout or unsent."""

    due: float
    seconds: float
    status: int | None
    fault: str | None
    body: bytes


class Connections:
    """Keep-alive connections to one server, opened as they are needed and closed at the end of an ``async with``."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = deque()

    async def __aenter__(self) -> "Connections":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def ask(self, request: bytes, due: float | None = None) -> Answer:
        due = time.monotonic() if due is None else due
        status, fault, body = None, None, b""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                status, body = await self._exchange(request)
        except ConnectionRefusedError:
            fault = "refused"
        except (OSError, EOFError):
            fault = "reset"
        except TimeoutError:
            fault = "timeout"
        return Answer(due, time.monotonic() - due, status, fault, body)

    async def close(self) -> None:
        """Every connection that is kept."""
        while self._idle:
            await _close(self._idle.pop()[1])

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
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
            rested = time.monotonic() - since
            if not reader.at_eof() and not writer.is_closing() and rested < IDLE_SECONDS:
                return reader, writer
            await _close(writer)
        return await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode()


def post(path: str, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def png(seed: int) -> bytes:
    """A photo of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def mixed(count: int = 64, steps: int = 4) -> list[bytes]:
    """Requests of every kind: words of random letters, photos, both, refined and generated from."""
    requests = []
    for number in range(count):
        word = "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=5))
        photo = base64.b64encode(png(number)).decode()
        item = ({"word": word}, {"photo": photo}, {"word": word, "photo": photo})[number % 3]
        path = "/cross-generate" if number % 4 == 3 else "/embed"
        targets = {"targets": ["digit"]} if path == "/cross-generate" else {}
        requests.append(post(path, {"inputs": [item], "refine": {"steps": steps * (number % 2)}, "seed": number, **targets}))
    return requests


async def flow(
    connections: Connections,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    going: Callable[[], bool] = lambda: True,
    seed: int = 0,
) -> list[Answer]:
    """Send ``rate`` requests a second on average, at random moments, while this lasts and ``going``; wait for all answers."""
    answers: list[Answer] = []
    tasks: set[asyncio.Task[None]] = set()
    chance = random.Random(seed)
    due = time.monotonic()
    end = due + seconds
    count = 0

    async def one(request: bytes, due: float) -> None:
        answers.append(await connections.ask(request, due))

    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if not going():
            break
        if len(tasks) >= MOST_OPEN:
            answers.append(Answer(due, 0.0, None, "unsent", b""))
            continue
        task = asyncio.create_task(one(requests[count % len(requests)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        count += 1
    await asyncio.gather(*tasks)
    return answers


async def closed(connections: Connections, requests: Sequence[bytes], clients: int, seconds: float) -> float:
    """Answers of status 200 a second, when so many clients each ask again as soon as they are answered, or may come back."""
    end = time.monotonic() + seconds

    async def client(number: int) -> int:
        done = 0
        while time.monotonic() < end:
            answer = await connections.ask(requests[(number + done) % len(requests)])
            if answer.status == 503:
                await asyncio.sleep(json.loads(answer.body)["retry_after_ms"] / 1000)
                continue
            assert answer.status == 200, answer
            done += 1
        return done

    began = time.monotonic()
    counts = await asyncio.gather(*(client(number) for number in range(clients)))
    return sum(counts) / (time.monotonic() - began)


def quantiles(answers: Sequence[Answer]) -> dict[str, float]:
    """Milliseconds."""
    if not answers:
        return {}
    times = 1000 * np.array([answer.seconds for answer in answers])
    return {name: round(float(np.quantile(times, q)), 2) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def outcomes(answers: Sequence[Answer]) -> dict[str, int]:
    """How many of each status and fault."""
    return dict(Counter(str(answer.status or answer.fault) for answer in answers))
