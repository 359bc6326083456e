"""uvicorn as this service runs it: how connections come, how long they may take, and how all of it ends."""

import asyncio
import functools
import math
import os
import re
import signal
import socket
import threading
import uuid
from time import monotonic
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Response
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.door import Door
from service.errors import Problem
from service.settings import Settings

KEEP_ALIVE_SECONDS = 75
"""Longer than balancers keep a connection that nobody uses, so that they close it and not we, while they send."""
LINGER_SECONDS = 1.0
"""At the end an unused connection may still bring one request for so long."""
UNREAD_MS = 30_000
"""Who does not take in an answer for so long is cut off by the kernel."""
MOST_HEAD_BYTES = 64 << 10
"""Of a request's line and headers. The parser itself would take in any number."""
FORCED = 1

log = structlog.get_logger(__name__)


_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_TOO_LARGE = Problem("headers_too_large", f"the request's line and headers are larger than {MOST_HEAD_BYTES} bytes")


class State(ServerState):
    """What all connections share."""

    draining = False


class _Together:
    """A transport that holds the head of an answer back until the body comes, so that one call and one packet take both."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = b""

    def write(self, data: bytes) -> None:
        if self._head == b"":
            self._head = data
        elif self._head is not None:
            self._transport.writelines([self._head, data])
            self._head = None
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class Protocol(HttpToolsProtocol):
    """One connection.

    Args:
        head_seconds: for the headers of a request.
        body_seconds: for the rest of it. The application answers before; this ends who goes on sending.
        door: refuses what needs no application for that.
    """

    def __init__(self, *args: Any, head_seconds: float, body_seconds: float, door: Door | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door = door
        self._refused = self._last = False  # at the door: the rest of the request goes nowhere, and perhaps nothing after it
        self._head_seconds = head_seconds
        self._body_seconds = body_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._within_message = False
        self._messages = 0
        self._head_bytes: int | None = None  # none outside of a head
        self._running: RequestResponseCycle | None = None  # uvicorn's ``cycle`` is the newest, which may wait for this one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._within(self._head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        if not self._within_message:
            # Java's client offers HTTP/2 with each first request. The parser would take that for the end of HTTP, and what
            # follows, which is the body, for something else.
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        number = self._messages if self._head_bytes is not None else None
        super().data_received(data)
        if number == self._messages and self._head_bytes is not None:  # all of this belongs to one head
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._within_message = True
        self._refused = False
        self._messages += 1
        self._head_bytes = 0
        self._within(self._head_seconds, self._late)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
            raise ValueError("too large")  # which ends the parsing
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            raise ValueError("where the body ends is open to dispute")
        self._within(self._body_seconds, self.transport.close)
        # Where this is the last request of its connection the answer says so, and the client asks elsewhere next.
        last = getattr(self.server_state, "draining", False) or not self.parser.should_keep_alive()
        if self._turned_away(last):
            return
        super().on_headers_complete()
        if last:
            self.cycle.keep_alive = False
        if self.parser.get_method() != b"HEAD" and not self.expect_100_continue:
            self.cycle.transport = _Together(self.transport)  # type: ignore[assignment]  # all of it that is used

    def _turned_away(self, last: bool) -> bool:
        """Answered by the door: what stands alone, from who takes in answers and sends its body without being asked to."""
        alone = self.cycle is None or self.cycle.response_complete
        clear = not (self.flow.write_paused or self.transport.is_closing())
        if self._door is None or not (alone and clear) or self.expect_100_continue:
            return False
        refusal = self._door.refusal(self.parser.get_method(), self.url, self.headers)
        if refusal is None:
            return False
        if last:
            refusal.headers["Connection"] = "close"
        self._refused, self._last = True, last
        self._write(refusal)
        return True

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()
        elif self._last:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._within_message = False
        self._within(None)
        if not self.pipeline:
            # uvicorn stops reading when a body comes faster than it is taken, and would then not see this client leave.
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._within(None)
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            state = self._running.scope["state"]
            task = state.get("task")
            if task is not None:
                state["gone"] = True
                task.cancel()

    def shutdown(self) -> None:
        """Leaves an unused connection open for a moment: who is just sending must not meet a closed one."""
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(LINGER_SECONDS, self.timeout_keep_alive_handler)
        else:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """To bytes that are no HTTP request, which no application gets to see, the answer is a problem object too."""
        self._refuse(Problem("bad_request", msg))

    def _late(self) -> None:
        self._refuse(Problem("request_timeout", f"the headers were not there within {self._head_seconds:g} s"))

    def _refuse(self, problem: Problem) -> None:
        if self.transport.is_closing():
            return
        answer = problem.answer(uuid.uuid4().hex)
        answer.headers["Connection"] = "close"
        self._write(answer)
        self.transport.close()

    def _write(self, answer: Response) -> None:
        headers = (*self.server_state.default_headers, *answer.raw_headers)
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[answer.status_code], head, answer.body))

    def _within(self, seconds: float | None, otherwise: Any = None) -> None:
        """Do this unless the next step comes in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, otherwise)


class Server(uvicorn.Server):
    """SIGTERM: not ready at once, but serving on while balancers find out, then no more connections, then the end of what is in
    flight. SIGINT leaves the second part out. A second signal ends the process on the spot. SIGHUP looks for new bundles."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(configure(app, settings, app.state.door))
        self.server_state: State = State()
        self._bundles = app.state.bundles
        self._drain_delay = settings.drain_delay_ms / 1000
        self._leave_at: float | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._bundles.reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        if self._leave_at is not None:
            os._exit(FORCED)
        self._captured_signals.append(sig)
        self._leave_at = monotonic() + (self._drain_delay if sig == signal.SIGTERM and self.started else 0)
        self._bundles.draining = self.server_state.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._leave_at is not None:
            if not self._told:
                self._told = True
                log.warning("stopping", serving_on_for_seconds=round(max(0.0, self._leave_at - monotonic()), 1))
            self.should_exit = self.should_exit or monotonic() >= self._leave_at
        return await super().on_tick(counter)


def configure(app: FastAPI, settings: Settings, door: Door | None = None) -> uvicorn.Config:
    """Of a server that waits ``grace_ms`` at its end, no longer."""
    times = {"head_seconds": settings.head_timeout_ms / 1000, "body_seconds": settings.request_timeout_ms / 1000 + 1}
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=functools.partial(Protocol, door=door, **times),  # type: ignore[arg-type]  # all it does is call it
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.grace_ms / 1000),
    )


def bind(host: str, port: int) -> socket.socket:
    """Bound, not yet listening: what connects before the bundle is loaded is refused, and may try again.

    Raises:
        OSError: no such address, or it is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)  # connections inherit it
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
