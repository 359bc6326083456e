"""Threads for what would block the event loop: parsing large bodies, compressing pictures."""

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

StillWanted = Callable[[], bool]
"""Whether the client still waits for the response."""


class ParsePool:
    """For one event loop.

    Args:
        threads: that parse at the same time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="parse")
        self.pending = 0
        """Requests that are parsed in a thread or wait for one."""
        self._seconds = 0.0  # running average between two finished requests

    @property
    def wait_seconds(self) -> float:
        """Expected time until the pending requests are parsed."""
        return self.pending * self._seconds

    async def parse(self, function: Callable[[StillWanted], R]) -> R:
        """The result of ``while_wanted``, which counts as pending until then."""
        started = time.perf_counter()
        self.pending += 1
        try:
            result = await self.while_wanted(function)
            self._seconds += 0.1 * ((time.perf_counter() - started) / self.pending - self._seconds)
        finally:
            self.pending -= 1
        return result

    async def while_wanted(self, function: Callable[[StillWanted], R]) -> R:
        """The function's result. It may ask whether that is still wanted: a thread cannot be stopped from outside."""
        abandoned = threading.Event()
        try:
            return await self.in_thread(function, lambda: not abandoned.is_set())
        finally:
            abandoned.set()

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(function, *args, **kwargs))

    def stop(self) -> None:
        """Cancel what waits."""
        self._threads.shutdown(wait=False, cancel_futures=True)
