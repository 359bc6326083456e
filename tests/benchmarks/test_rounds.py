"""The load generator's latencies, the goodput, and the check that all servers serve the same model."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tests.benchmarks.rounds import embeddings_of, goodput, sequential, verify_same_embeddings
from tests.benchmarks.servers import CONCORD
from tests.support.traffic import Connections, closed_loop, get, open_loop, quantiles

STALL = 0.4
"""Seconds."""


@asynccontextmanager
async def serving(respond: Callable[[], Awaitable[bytes]]) -> AsyncIterator[int]:
    """Run a server that responds to every request with the body from ``respond``, and return its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            body = await respond()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async def serve_until_disconnect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve_until_disconnect, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_open_loop_counts_requests_due_during_a_stall_as_waiting() -> None:
    """A closed loop would send one request during the stall, and report one long latency."""
    stall_ends: list[float] = []

    async def respond() -> bytes:
        loop = asyncio.get_running_loop()
        if not stall_ends:
            stall_ends.append(loop.time() + STALL)
        await asyncio.sleep(max(0.0, stall_ends[0] - loop.time()))
        return b"{}"

    async def test() -> None:
        async with serving(respond) as port, Connections(port) as connections:
            responses = await open_loop(connections, [get("/")], rate=200, seconds=2 * STALL)
        assert quantiles(responses)["max"] >= 1000 * STALL * 0.9
        waiting = [response for response in responses if response.seconds > STALL / 4]
        assert len(waiting) > len(responses) / 5

    asyncio.run(test())


def test_send_counts_seconds_from_when_the_request_was_due() -> None:
    async def respond() -> bytes:
        return b"{}"

    async def test() -> None:
        async with serving(respond) as port, Connections(port) as connections:
            due = asyncio.get_running_loop().time() - 0.25  # asyncio's clock is the monotonic one
            assert (await connections.send(get("/"), due)).seconds >= 0.25
            assert len(await sequential(connections, [get("/")], 0.05)) > 1
            assert await closed_loop(connections, [get("/")], 4, 0.05) > 0

    asyncio.run(test())


@pytest.mark.parametrize(("milliseconds", "within_limit"), [(0, True), (60, False)])
def test_goodput_counts_only_responses_within_the_latency_limit(milliseconds: float, within_limit: bool) -> None:
    async def respond() -> bytes:
        await asyncio.sleep(milliseconds / 1000)
        return b"{}"

    async def test() -> None:
        async with serving(respond) as port, Connections(port) as connections:
            assert (await goodput(connections, [get("/")], 100, 0.1) > 0) == within_limit

    asyncio.run(test())


@pytest.mark.parametrize(("difference", "same"), [(0.0, True), (9e-6, True), (2e-5, False)])
def test_verify_same_embeddings_raises_above_the_tolerance(difference: float, same: bool) -> None:
    reference, embeddings = np.array([[0.5, 1.0]]), np.array([[0.5 + difference, 1.0]])
    if same:
        assert verify_same_embeddings(embeddings, reference) == pytest.approx(difference, abs=1e-9)
    else:
        with pytest.raises(AssertionError, match="embeddings differ"):
            verify_same_embeddings(embeddings, reference)


def test_embeddings_of_returns_one_row_for_each_item() -> None:
    async def respond() -> bytes:
        return json.dumps({"data": [{"embedding": [0.5, 1.0]}]}).encode()

    async def test() -> None:
        async with serving(respond) as port:
            assert (await embeddings_of(CONCORD, port, [{"word": "one"}, {"word": "two"}])).tolist() == [[0.5, 1.0]] * 2

    asyncio.run(test())
