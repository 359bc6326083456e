"""uvicorn as this service runs it: time limits of connections, admission control, and the shutdown."""

import asyncio
import functools
import math
import os
import signal
import socket
import threading
import uuid
from time import monotonic
from types import FrameType
from typing import Any, cast

import httptools
import structlog
import uvicorn
from fastapi import FastAPI, Response
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from concord.service.errors import Problem
from concord.service.http.admission import AdmissionControl
from concord.service.http.joined_writes import JoinedWrites
from concord.service.request_state import find_state
from concord.service.settings import Settings

KEEP_ALIVE_SECONDS = 75
"""Longer than balancers keep an idle connection: then they close it, and never send into one that closes."""
LINGER_SECONDS = 1.0
"""At shutdown an idle connection may still send one request within this time."""
UNREAD_MS = 30_000
"""The kernel closes the connection of a client that does not read its response within this time."""
MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers. The parser itself has no limit."""
FORCED = 1

log = structlog.get_logger(__name__)


_TOO_LARGE = Problem("headers_too_large", f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")


class State(ServerState):
    """Shared by all connections."""

    draining = False


class Protocol(HttpToolsProtocol):
    """One connection.

    Args:
        head_seconds: for the headers of a request.
        body_seconds: for the rest of it. The application has responded by then; this closes a connection that goes on sending.
        admission: rejects requests before the application sees them.
    """

    def __init__(
        self, *args: Any, head_seconds: float, body_seconds: float, admission: AdmissionControl | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._admission = admission
        self._rejected = self._last = False  # by admission control: the rest of the request is discarded; the connection ends
        self._head_seconds = head_seconds
        self._body_seconds = body_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._messages = 0
        self._head_bytes: int | None = None  # None outside of a head
        self._running: RequestResponseCycle | None = None  # uvicorn's ``cycle`` is the newest, which may wait for it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, JoinedWrites(transport, self.loop)))
        self._limit(self._head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        number = self._messages if self._head_bytes is not None else None
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("the bytes received are not an HTTP request")
            return
        if number == self._messages and self._head_bytes is not None:  # all of this belongs to one head
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._close_with(_TOO_LARGE)

    def _feed(self, data: bytes) -> None:
        """Parse what was received. Clients such as Java's offer HTTP/2 by an Upgrade header. The parser takes it for the end of
        HTTP and skips the body; a new parser gets the same head without the offer, and then the rest."""
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offers_upgrade():
                    return None
                headers = b"".join(b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade")
                line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                data = b"%s\r\n%s\r\n%s" % (line, headers, data[upgrade.args[0] :])
                self.parser = httptools.HttpRequestParser(self)

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._rejected = False
        self._messages += 1
        self._head_bytes = 0
        self._limit(self._head_seconds, self._late)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_bytes is not None:  # else a trailer, which must not become a header: no proxy has checked it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        if self._offers_upgrade():
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._close_with(_TOO_LARGE)
            raise ValueError("too large")  # ends the parsing
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            raise ValueError("ambiguous end of the body")
        self._limit(self._body_seconds, self.transport.close)
        # The response to the last request of a connection says so, and the client opens another one next.
        last = getattr(self.server_state, "draining", False) or not self.parser.should_keep_alive()
        if self._reject(last):
            return
        super().on_headers_complete()
        if last:
            self.cycle.keep_alive = False

    def _reject(self, last: bool) -> bool:
        """Reject the request if it does not fit. One that is pipelined, or whose client does not read responses, goes on to the
        application."""
        alone = self.cycle is None or self.cycle.response_complete
        clear = not (self.flow.write_paused or self.transport.is_closing())
        if self._admission is None or not (alone and clear):
            return False
        rejection = self._admission.reject(self.parser.get_method(), self.url, self.headers)
        if rejection is None:
            return False
        waiting = self.expect_100_continue  # whether its body follows is up to the client, so the connection ends
        if last or waiting:
            rejection.headers["Connection"] = "close"
        self._rejected, self._last = True, last or waiting
        self._write(rejection)
        if waiting:
            self.transport.close()
        return True

    def on_body(self, body: bytes) -> None:
        if not self._rejected:
            super().on_body(body)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        if self._offers_upgrade():
            return
        if not self._rejected:
            super().on_message_complete()
        elif self._last:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._limit(None)
        if not self.pipeline:
            # uvicorn stops reading when a body arrives faster than it is read, and would then not notice a disconnect.
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            state = find_state(self._running.scope)
            if state is not None and state.task is not None:
                state.client_gone = True
                state.task.cancel()

    def shutdown(self) -> None:
        """Leave an idle connection open for a moment: a client may be sending a request right now."""
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(LINGER_SECONDS, self.timeout_keep_alive_handler)
        else:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Bytes that are not an HTTP request, which the application never sees, get a problem object too."""
        self._close_with(Problem("bad_request", msg))

    def _late(self) -> None:
        self._close_with(Problem("request_timeout", f"the headers were not there within {self._head_seconds:g} s"))

    def _close_with(self, problem: Problem) -> None:
        if self.transport.is_closing():
            return
        response = problem.response(uuid.uuid4().hex)
        response.headers["Connection"] = "close"
        self._write(response)
        self.transport.close()

    def _write(self, response: Response) -> None:
        headers = (*self.server_state.default_headers, *response.raw_headers)
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[response.status_code], head, response.body))

    def _limit(self, seconds: float | None, otherwise: Any = None) -> None:
        """Call ``otherwise`` unless the next step happens in time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, otherwise)


class Server(uvicorn.Server):
    """SIGTERM: readiness fails at once, requests are served for a delay while balancers notice, then no new connections are
    accepted, then requests in flight finish. SIGINT skips the delay. A second signal ends the process immediately. SIGHUP
    reloads bundles."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(configure(app, settings, app.state.admission))
        self.server_state: State = State()
        self._health = app.state.health
        self._reloader = app.state.reloader
        self._drain_delay = settings.drain_delay_ms / 1000
        self._leave_at: float | None = None
        self._logged = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reloader.reload)
        await super().startup(sockets)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        if self._leave_at is not None:
            os._exit(FORCED)
        self._captured_signals.append(sig)
        self._leave_at = monotonic() + (self._drain_delay if sig == signal.SIGTERM and self.started else 0)
        self._health.draining = self.server_state.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._leave_at is not None:
            if not self._logged:
                self._logged = True
                log.warning("stopping", serving_on_for_seconds=round(max(0.0, self._leave_at - monotonic()), 1))
            self.should_exit = self.should_exit or monotonic() >= self._leave_at
        return await super().on_tick(counter)


def configure(app: FastAPI, settings: Settings, admission: AdmissionControl | None = None) -> uvicorn.Config:
    """uvicorn's settings. At shutdown the server waits for at most ``grace_ms``."""
    times = {"head_seconds": settings.head_timeout_ms / 1000, "body_seconds": settings.request_timeout_ms / 1000 + 1}
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=functools.partial(Protocol, admission=admission, **times),  # type: ignore[arg-type]  # uvicorn only calls it
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
    """A bound socket that does not listen yet: connections before the bundle is loaded are refused, and may be retried.

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
