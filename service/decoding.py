"""The decode threads: few, and with a bounded number of requests before them."""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from service.calls import SlowError, Wanted
from service.engine import MIN_RETRY_MS
from service.errors import Problem
from service.telemetry import Metrics

P = ParamSpec("P")
R = TypeVar("R")


QUICK_BYTES = 8 << 10
"""Of a body that is tried on the event loop first: to hand it to a thread and back costs more than to decode it."""


class Decoding:
    """For one event loop.

    Args:
        threads: that decode side by side.
        most: requests that may be decoded or wait for it; each has at least one item.
    """

    def __init__(self, threads: int, most: int, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._most = most
        self._metrics = metrics
        self.held = 0
        """Requests that are decoded or wait for it."""
        self._seconds = 0.0  # from one that is done to the next

    def refusal(self) -> Problem | None:
        """503, where one more request is too many."""
        if self.held < self._most:
            return None
        wait_ms = max(MIN_RETRY_MS, int(1000 * self.held * self._seconds))
        return Problem("queue_full", f"{self.held} requests wait to be decoded", retry_after_ms=wait_ms)

    async def decode(self, read: Callable[[Wanted, bool], R], size: int) -> tuple[R, float]:
        """What this returns, and the seconds it took with the waiting before it.

        Args:
            read: may ask whether its answer is wanted any more: a thread is not stopped from outside. When it is told to do it
                quickly, it may raise ``SlowError`` instead.
            size: of the body, in bytes.

        Raises:
            Problem: 503, too many wait.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        started = time.perf_counter()
        if size <= QUICK_BYTES:
            with contextlib.suppress(SlowError):
                answer = read(lambda: True, True)
                seconds = time.perf_counter() - started
                self._metrics.stage("decode", seconds)
                return answer, seconds
        self.held += 1
        left = threading.Event()
        try:
            answer = await self.in_thread(read, lambda: not left.is_set(), False)
            seconds = time.perf_counter() - started
            self._seconds += 0.1 * (seconds / self.held - self._seconds)
        finally:
            left.set()
            self.held -= 1
        self._metrics.stage("decode", seconds)
        return answer, seconds

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what would hold up the event loop in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *args, **kwargs))

    def stop(self) -> None:
        """Forget what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
