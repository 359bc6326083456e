"""Admission control: a request that does not fit is rejected as soon as its headers arrive, before any application code runs.

At 10x capacity nine of ten requests are rejected, so the cost of a rejection comes straight out of goodput.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

import structlog
from fastapi import Response

from concord.service.errors import Problem
from concord.service.request_state import RequestState
from concord.service.telemetry.metrics import Metrics
from concord.service.telemetry.middleware import request_id_from
from concord.service.telemetry.tracing import Tracing, trace_header

LOG_SECONDS = 1.0
"""Rejections within this time share a line of the log."""

log = structlog.get_logger(__name__)


class AdmissionControl:
    """For one event loop. It checks no API key: overload is reported to any client.

    Args:
        paths: of the inference routes.
        check_capacity: why a request does not fit, or None; given the requests accepted in this iteration of the event loop.
        model_version: for the response's header.
    """

    def __init__(
        self,
        paths: Collection[str],
        check_capacity: Callable[[int], Problem | None],
        model_version: Callable[[], str],
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._paths = {path.encode(): path for path in paths}
        self._check_capacity = check_capacity
        self._model_version = model_version
        self._metrics = metrics
        self._tracing = tracing
        self._entering = 0  # accepted in this iteration of the event loop: counted nowhere else yet
        self._rejected = 0

    def reject(self, method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Response | None:
        """The response to a request that does not fit; None for a request to pass on.

        Args:
            headers: with their names in lower case.
        """
        path = self._paths.get(url.partition(b"?")[0])
        if path is None or method != b"POST":
            return None
        started = time.perf_counter()
        problem = self._check_capacity(self._entering)
        if problem is not None:
            return self._respond(problem, path, dict(headers), started)
        if not self._entering:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._entered)  # runs after all tasks of this iteration
        self._entering += 1
        return None

    def _entered(self) -> None:
        self._entering = 0

    def _respond(self, problem: Problem, path: str, headers: dict[bytes, bytes], started: float) -> Response:
        state = RequestState(
            request_id=request_id_from(headers.get(b"x-request-id", b"").decode("latin-1")),
            span=self._tracing.begin(headers.get(b"traceparent", b"").decode("latin-1"), "POST"),
            error_code=problem.code,
        )
        self._metrics.responded(path, problem.status, problem.code, time.perf_counter() - started)
        self._tracing.end(f"POST {path}", state, problem.status)
        problem.headers["X-Request-Id"] = state.request_id
        problem.headers["X-Model-Version"] = self._model_version()
        if traceparent := trace_header(state.span):
            problem.headers["traceparent"] = traceparent
        self._count(problem)
        return problem.response(state.request_id, path)

    def _count(self, problem: Problem) -> None:
        if not self._rejected:
            asyncio.get_running_loop().call_later(LOG_SECONDS, self._log, problem)
        self._rejected += 1

    def _log(self, first: Problem) -> None:
        log.warning("rejected", requests=self._rejected, code=first.code, reason=first.detail)
        self._rejected = 0
