"""Headers and body of a response leave in one system call."""

import asyncio

from concord.service.http.joined_writes import MAX_BYTES, JoinedWrites


class Recorder(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"name": "value"})
        self.events: list[bytes | str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.events.append(bytes(data))

    def close(self) -> None:
        self.events.append("close")

    def abort(self) -> None:
        self.events.append("abort")

    def is_closing(self) -> bool:
        return "close" in self.events or "abort" in self.events


def test_writes_of_one_iteration_are_one_write_and_later_ones_another() -> None:
    async def run() -> None:
        recorder = Recorder()
        transport = JoinedWrites(recorder, asyncio.get_running_loop())
        transport.write(b"head")
        transport.write(b"body")
        assert recorder.events == []
        await asyncio.sleep(0)
        transport.write(b"next")
        await asyncio.sleep(0)
        assert recorder.events == [b"headbody", b"next"]
        assert transport.get_extra_info("name") == "value"

    asyncio.run(run())


def test_close_sends_what_is_written_and_abort_does_not() -> None:
    async def run() -> None:
        for method, events in (("close", [b"last", "close"]), ("abort", ["abort"])):
            recorder = Recorder()
            transport = JoinedWrites(recorder, asyncio.get_running_loop())
            transport.write(b"last")
            getattr(transport, method)()
            await asyncio.sleep(0)
            assert recorder.events == events

    asyncio.run(run())


def test_more_than_the_limit_is_sent_at_once() -> None:
    async def run() -> None:
        recorder = Recorder()
        transport = JoinedWrites(recorder, asyncio.get_running_loop())
        transport.write(bytes(MAX_BYTES))
        assert recorder.events == []
        transport.write(b"more")
        assert [len(event) for event in recorder.events] == [MAX_BYTES + 4]

    asyncio.run(run())
