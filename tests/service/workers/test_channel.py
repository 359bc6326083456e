"""Calls between two processes, here between two ends in one process."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from concord.service.workers.channel import Channel, ChannelError, frame, receive


async def add(first: int, second: int) -> int:
    return first + second


async def never() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("details stay in the log")


async def strange() -> object:
    """A result that is no JSON."""
    return object()


@contextlib.asynccontextmanager
async def channels() -> AsyncIterator[tuple[Channel, Channel]]:
    ends = socket.socketpair()
    opened = [await Channel.open(end, {"add": add, "never": never, "fail": fail, "strange": strange}) for end in ends]
    yield opened[0], opened[1]
    for channel in opened:
        await channel.close()


def test_calls_in_both_directions_run_at_the_same_time() -> None:
    async def run() -> None:
        async with channels() as (one, other):
            calls = [(one if number % 2 else other).call("add", number, 1) for number in range(20)]
            assert await asyncio.gather(*calls) == list(range(1, 21))

    asyncio.run(run())


def test_call_raises_for_a_failing_or_late_handler_or_one_that_never_comes() -> None:
    async def run() -> None:
        async with channels() as (one, other):
            with pytest.raises(ChannelError, match="fail: ValueError"):
                await one.call("fail")
            with pytest.raises(ChannelError, match="strange: TypeError"):
                await one.call("strange")
            with pytest.raises(TimeoutError):
                await one.call("never", seconds=0.01)
            waiting = asyncio.create_task(one.call("never"))
            await asyncio.sleep(0)
            await other.close()
            with pytest.raises(ChannelError, match="has ended"):
                await waiting
            with pytest.raises(ChannelError, match="has ended"):
                await one.call("add", 1, 2)

    asyncio.run(run())


def test_receive_waits_for_a_whole_message_and_notices_the_end() -> None:
    sender, receiver = socket.socketpair()
    content: Any = {"settings": ["x" * 500_000]}
    sender.setblocking(False)
    message = frame(content)
    sent = sender.send(message)
    sender.setblocking(True)

    async def run() -> Any:
        receiving = asyncio.create_task(asyncio.to_thread(receive, receiver))
        await asyncio.to_thread(sender.sendall, message[sent:])
        return await receiving

    assert asyncio.run(run()) == content
    sender.close()
    with pytest.raises(EOFError):
        receive(receiver)
    receiver.close()
