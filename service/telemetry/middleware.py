"""The outermost middleware: request ids, durations, traces, and a response to every unexpected error."""

import asyncio
import logging
import random
import re
import time
import traceback
from collections.abc import Callable, Collection
from functools import cached_property

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord.service.errors import CODES, Problem, respond
from concord.service.request_state import RequestState, attach, state_of
from concord.service.telemetry.metrics import Metrics
from concord.service.telemetry.tracing import Tracing, trace_header, trace_id

log = structlog.get_logger(__name__)

ALONE_REQUESTS = 8
"""Requests in a row over one connection after which its client counts as the only one."""
SHOWN_FRAMES = 6
"""Innermost frames of an unexpected error in the log."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Interrupted(Exception):  # noqa: N818
    """A response broke off after its first byte: all that is left is to close the connection."""


def request_id_from(header: str) -> str:
    """The id that the client sent, if it is harmless, or a new one."""
    return header if header and _REQUEST_ID.fullmatch(header) else f"{random.getrandbits(128):032x}"


class Telemetry:
    """Gives each request its id and state, measures and counts it, and turns an unexpected error into a 500 without details.

    Args:
        routes: paths that the metrics may name for a request that is rejected before it reaches its route.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        model_version: Callable[[], str],
        routes: Collection[str] = (),
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.model_version = model_version
        self.routes = routes
        self.tracing = tracing or Tracing()
        self._last_client: object = None
        self._in_a_row = 0

    @cached_property
    def _logs_success(self) -> bool:
        """Known at the first response, when logging is configured: a line that the log discards takes 10 µs."""
        return bool(log.bind().is_enabled_for(logging.DEBUG))

    def _is_alone(self, client: object) -> bool:
        self._in_a_row = self._in_a_row + 1 if client == self._last_client else 0
        self._last_client = client
        return self._in_a_row >= ALONE_REQUESTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = traceparent = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = request_id or value
            elif name == b"traceparent":
                traceparent = traceparent or value
        state = RequestState(
            request_id=request_id_from(request_id.decode("latin-1")),
            span=self.tracing.begin(traceparent.decode("latin-1"), scope["method"]),
            task=asyncio.current_task(),
            alone=self._is_alone(scope.get("client")),
        )
        attach(scope, state)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": state.request_id, "x-model-version": state.model_version or self.model_version()}
                if header := trace_header(state.span):
                    more["traceparent"] = header
                message["headers"] += [(name.encode(), value.encode()) for name, value in more.items()]
                self._record(scope, status, time.perf_counter() - started)
            await send(message)

        self.metrics.in_flight += 1
        try:
            await self.app(scope, receive, observed)
        except asyncio.CancelledError:
            # Not raised again: the task ends here, and uvicorn would log it as an error.
            if state.client_gone:
                state.error_code = "client_gone"
                if not status:
                    self._record(scope, CODES["client_gone"][0], time.perf_counter() - started)
            elif not status:
                stopping = Problem("not_ready", "the server is stopping: ask another one", retry_after_ms=1000)
                await respond(scope, stopping)(scope, receive, observed)
        except Exception as error:
            # The message may quote the request, so the log gets only the place.
            log.error("request failed", request_id=state.request_id, error=type(error).__name__, at=_place(error))
            if status:
                raise Interrupted from None
            response = respond(scope, Problem("internal", "the server failed: report the request id"))
            await response(scope, receive, observed)
        finally:
            self.metrics.in_flight -= 1

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        known = scope["path"] if scope["path"] in self.routes else "unmatched"
        route = str(getattr(scope.get("route"), "path", known))
        state = state_of(scope)
        code = state.error_code
        self.metrics.responded(route, status, code, seconds)
        self.tracing.end(f"{scope['method']} {route}", state, status)
        if status < 400 and not self._logs_success:
            return
        fault = status >= 500 and code != "queue_full"  # overload is no fault, and comes in thousands
        write = log.debug if status < 400 else log.error if fault else log.info
        write(
            "response",
            request_id=state.request_id,
            method=scope["method"],
            route=route,
            status=status,
            code=code,
            ms=round(1000 * seconds, 2),
            **{name: value for name, value in (("key", state.api_key), ("trace_id", trace_id(state.span))) if value},
        )


def _place(error: BaseException) -> list[str]:
    """Where it was raised: file, line and function of the innermost frames."""
    frames = traceback.extract_tb(error.__traceback__)[-SHOWN_FRAMES:]
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
