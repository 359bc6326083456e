"""A transport that sends what is written in one iteration of the event loop in one system call."""

import asyncio
from typing import Any

MAX_BYTES = 64 << 10
"""More is sent at once, so that the transport notices a client that does not read."""


class JoinedWrites:
    """uvicorn writes the headers and the body of a response separately. Sent together, the client wakes up once, and the
    responses of a batch are all built before the first is sent.

    Everything but ``write``, ``close`` and ``abort`` is that of the transport.
    """

    __slots__ = ("_bytes", "_loop", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Send ``data`` after this callback or task step."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes > MAX_BYTES:
            self._flush()

    def close(self) -> None:
        """Send what is written, then close."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close without sending what is written."""
        self._parts.clear()
        self._bytes = 0
        self._transport.abort()

    def _flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._bytes = 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
