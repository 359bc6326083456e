"""Wait for a condition instead of sleeping: a loaded machine may need more time than a test would allow."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 60.0
"""Longest wait. Only a failing test reaches it."""
INTERVAL = 0.01
"""Seconds between two checks."""


def wait_for(
    condition: Callable[[], T],
    seconds: float = SECONDS,
    message: str = "the condition did not become true",
    interval: float = INTERVAL,
) -> T:
    """Call ``condition`` until its value is true, and return that value.

    Raises:
        AssertionError: it is still false after ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"after {seconds:g} s: {message}"
        time.sleep(interval)
    return value


async def wait_for_async(
    condition: Callable[[], T],
    seconds: float = SECONDS,
    message: str = "the condition did not become true",
    interval: float = INTERVAL,
) -> T:
    """Do the same on an event loop, which runs other tasks between two checks."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"after {seconds:g} s: {message}"
        await asyncio.sleep(interval)
    return value
