"""The worker's end of its connection to the supervisor."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping

from concord.service.workers.channel import Channel, ChannelError, Handler

CALL_SECONDS = 2.0


class SupervisorLink:
    """What a worker knows of the other workers: nothing but what the supervisor reports. For one event loop.

    Args:
        end: of the socket pair.
        on_lost: called when the supervisor has ended.
    """

    def __init__(self, end: socket.socket, on_lost: Callable[[], None]) -> None:
        self._end = end
        self._on_lost = on_lost
        self._channel: Channel | None = None

    @contextlib.asynccontextmanager
    async def opened(self, handlers: Mapping[str, Handler]) -> AsyncIterator[None]:
        """Serves the supervisor's calls inside this context."""
        channel = self._channel = await Channel.open(self._end, handlers)
        watching = asyncio.create_task(self._watch(channel))
        try:
            yield
        finally:
            watching.cancel()
            await channel.close()

    async def report_ready(self) -> None:
        """This worker accepts requests."""
        await self._opened().call("ready")

    async def liveness(self) -> dict[str, str]:
        """The checks of /livez. A supervisor that does not respond in time is one that fails."""
        return await self._checks("liveness")

    async def readiness(self) -> dict[str, str]:
        """The checks of /readyz, of all workers together."""
        return await self._checks("readiness")

    async def metrics(self) -> bytes:
        """Prometheus text, of all workers together.

        Raises:
            ChannelError, TimeoutError: the supervisor does not respond.
        """
        text: str = await self._opened().call("metrics", seconds=2 * CALL_SECONDS)
        return text.encode()

    async def _checks(self, name: str) -> dict[str, str]:
        try:
            checks: dict[str, str] = await self._opened().call(name, seconds=CALL_SECONDS)
        except (ChannelError, TimeoutError):
            return {"supervisor": "it does not respond"}
        return checks

    async def _watch(self, channel: Channel) -> None:
        await channel.closed
        self._on_lost()

    def _opened(self) -> Channel:
        assert self._channel is not None
        return self._channel
