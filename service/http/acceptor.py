"""Accepts connections from a socket that other processes accept from too, so that all of them have about as many.

Without this, whichever process runs first takes all connections that wait, and keeps them: 13 of 16, where two workers share.
"""

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import Callable

RETRY_SECONDS = 0.1
"""Wait after an error such as too many open files, which would else come at once again."""
DEFER_SECONDS = 0.001
MAX_DEFERRED = 20
"""A process with more connections than another leaves it a new one for so many times ``DEFER_SECONDS``."""
_COUNT = struct.Struct("<I")
_ABSENT = 2**32 - 1


class ConnectionCounts:
    """How many connections each process has, in memory that they share.

    Args:
        descriptor: of the memory, as ``create`` returns it.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)

    @staticmethod
    def create(processes: int) -> int:
        """Descriptor of new memory, in which all processes are absent."""
        descriptor = os.memfd_create("concord-connections")
        os.write(descriptor, _COUNT.pack(_ABSENT) * processes)
        return descriptor

    def set(self, process: int, count: int | None) -> None:
        """A process, numbered from 0, has so many connections; None: it is absent."""
        _COUNT.pack_into(self._memory, process * _COUNT.size, _ABSENT if count is None else count)

    def least(self) -> int:
        """Connections of the process that has the fewest."""
        return min(int(count) for (count,) in _COUNT.iter_unpack(self._memory))


class Acceptor:
    """Accepts one connection in an iteration of the event loop.

    Args:
        listener: bound. It is closed by ``close``.
        protocol: makes the protocol of a connection.
        backlog: connections that may wait.
        defer: whether another process should get the next connection.
    """

    def __init__(
        self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol], backlog: int, defer: Callable[[], bool]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._protocol = protocol
        self._defer = defer
        self._deferred = 0
        self._connecting: set[asyncio.Task[object]] = set()
        listener.setblocking(False)
        listener.listen(backlog)
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """uvicorn waits for this after ``close``."""

    def _accept(self) -> None:
        if self._deferred < MAX_DEFERRED and self._defer():
            self._deferred += 1
            self._pause(DEFER_SECONDS)
            return
        self._deferred = 0
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process has it, or the client is gone
            return
        except OSError:
            self._pause(RETRY_SECONDS)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)
