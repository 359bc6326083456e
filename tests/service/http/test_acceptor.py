"""Connections that several event loops accept from one socket."""

import asyncio
import socket

import pytest

from concord.service.http.acceptor import Acceptor, ConnectionCounts


def test_connection_counts_ignore_absent_processes() -> None:
    descriptor = ConnectionCounts.create(3)
    own, other = ConnectionCounts(descriptor), ConnectionCounts(descriptor)
    own.set(0, 5)
    other.set(2, 3)
    assert own.least() == 3
    own.set(2, None)
    assert other.least() == 5


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"accepted")
        transport.close()


@pytest.mark.parametrize("deferrals", [0, 3, 10_000])
def test_acceptor_defers_to_another_process_for_a_limited_time(deferrals: int) -> None:
    """If no other process takes the connection, this one does."""
    calls = 0

    def defer() -> bool:
        nonlocal calls
        calls += 1
        return calls <= deferrals

    async def run() -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        acceptor = Acceptor(listener, Echo, 16, defer)
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.read() == b"accepted"
            writer.close()
        acceptor.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)

    asyncio.run(run())
