"""The generator's clocks, and the gate that nobody passes with other answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.contestants import OURS
from tests.benchmarks.rounds import assert_alike, goodput, in_turn
from tests.traffic import Connections, closed, flow, get, quantiles

STALL = 0.4


@asynccontextmanager
async def answering(respond: Callable[[], Awaitable[bytes]]) -> AsyncIterator[int]:
    """The port of a server that answers every request with this body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            body = await respond()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async def serve_until_left(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve_until_left, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_who_was_due_while_the_server_stalled_waited_for_it() -> None:
    """A closed loop would have sent one request meanwhile, and told of one."""
    stalled: list[float] = []

    async def respond() -> bytes:
        loop = asyncio.get_running_loop()
        if not stalled:
            stalled.append(loop.time() + STALL)
        await asyncio.sleep(max(0.0, stalled[0] - loop.time()))
        return b"{}"

    async def test() -> None:
        async with answering(respond) as port, Connections(port) as connections:
            answers = await flow(connections, [get("/")], rate=200, seconds=2 * STALL)
        told = quantiles(answers)
        assert told["max"] >= 1000 * STALL * 0.9
        waited = [answer for answer in answers if answer.seconds > STALL / 4]
        assert len(waited) > len(answers) / 5

    asyncio.run(test())


def test_the_time_counts_from_when_a_request_was_due() -> None:
    async def respond() -> bytes:
        return b"{}"

    async def test() -> None:
        async with answering(respond) as port, Connections(port) as connections:
            due = asyncio.get_running_loop().time() - 0.25  # asyncio's clock is the monotonic one
            assert (await connections.ask(get("/"), due)).seconds >= 0.25
            assert len(await in_turn(connections, [get("/")], 0.05)) > 1
            assert await closed(connections, [get("/")], 4, 0.05) > 0

    asyncio.run(test())


@pytest.mark.parametrize(("milliseconds", "good"), [(0, True), (60, False)])
def test_goodput_takes_only_what_is_in_time(milliseconds: float, good: bool) -> None:
    async def respond() -> bytes:
        await asyncio.sleep(milliseconds / 1000)
        return b"{}"

    async def test() -> None:
        async with answering(respond) as port, Connections(port) as connections:
            assert (await goodput(connections, [get("/")], 100, 0.1) > 0) == good

    asyncio.run(test())


@pytest.mark.parametrize(("off", "alike"), [(0.0, True), (9e-6, True), (2e-5, False)])
def test_other_answers_end_the_comparison(off: float, alike: bool) -> None:
    def embedding(value: float) -> bytes:
        return json.dumps({"data": [{"embedding": [value, 1.0]}]}).encode()

    async def test() -> None:
        async def ours() -> bytes:
            return embedding(0.5)

        async def theirs() -> bytes:
            return embedding(0.5 + off)

        async with answering(ours) as first, answering(theirs) as second:
            up: dict[str, Any] = {
                "ours": (OURS, SimpleNamespace(port=first)),
                "theirs": (OURS, SimpleNamespace(port=second)),
            }
            assert await assert_alike(up, [{"word": "one"}]) == pytest.approx(off, abs=1e-9)

    if alike:
        asyncio.run(test())
    else:
        with pytest.raises(AssertionError, match="the answers differ"):
            asyncio.run(test())
