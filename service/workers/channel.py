"""Calls between the supervisor and a worker, in both directions, over a pair of Unix sockets."""

import asyncio
import itertools
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import structlog

_LENGTH = struct.Struct("!I")

Handler = Callable[..., Awaitable[Any]]
"""Serves the calls of one name. Arguments and result are JSON."""

log = structlog.get_logger(__name__)


class ChannelError(Exception):
    """The other process has ended, or its handler raised an error, which it has logged."""


class Channel:
    """One end. For one event loop.

    Args:
        handlers: of the calls that the other process makes, by name.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[str, Handler]) -> None:
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = asyncio.create_task(self._read())
        """Done when the other process has ended."""

    @classmethod
    async def open(cls, end: socket.socket, handlers: Mapping[str, Handler]) -> "Channel":
        """Serve calls on this end of a socket pair."""
        return cls(*await asyncio.open_unix_connection(sock=end), handlers)

    async def call(self, name: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Return the result of the handler in the other process.

        Args:
            seconds: longest wait. None: wait as long as it takes.

        Raises:
            ChannelError: there is none.
            TimeoutError: there is none yet.
        """
        if self.closed.done():
            raise ChannelError("the other process has ended")
        number = next(self._numbers)
        self._calls[number] = future = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(frame([number, name, arguments]))
                return await future
        finally:
            del self._calls[number]

    async def close(self) -> None:
        """Close this end. The calls that are running are cancelled."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
        await asyncio.gather(self.closed, *self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                number, name, content = orjson.loads(await self._reader.readexactly(length))
                if name is not None:
                    task = asyncio.create_task(self._serve(number, name, content))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                elif (future := self._calls.get(number)) is not None and not future.done():
                    if "error" in content:
                        future.set_exception(ChannelError(content["error"]))
                    else:
                        future.set_result(content["result"])
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(ChannelError("the other process has ended"))

    async def _serve(self, number: int, name: str, arguments: list[Any]) -> None:
        try:
            response = frame([number, None, {"result": await self._handlers[name](*arguments)}])
        except Exception as error:  # of the handler, or of a result that is no JSON
            log.exception("call failed", call=name)
            response = frame([number, None, {"error": f"{name}: {type(error).__name__}"}])
        if not self.closed.done():
            self._writer.write(response)


def frame(content: Any) -> bytes:
    """A message: its length, and the content as JSON."""
    encoded = orjson.dumps(content)
    return _LENGTH.pack(len(encoded)) + encoded


def receive(end: socket.socket) -> Any:
    """Wait for one message, before there is an event loop.

    Raises:
        EOFError: the other process has ended.
    """
    return orjson.loads(_receive(end, *_LENGTH.unpack(_receive(end, _LENGTH.size))))


def _receive(end: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = end.recv(size - len(content))
        if not part:
            raise EOFError("the other process has ended")
        content += part
    return content
