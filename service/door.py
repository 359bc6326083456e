"""The door: what cannot be taken now is refused at the head of its request, before an application hears of it.

Of ten times the load that a server can bear, nine parts are refusals. What each of them costs is taken from the tenth part.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import Response

from service.bundles import Bundles
from service.errors import Problem
from service.telemetry import Metrics, identity
from service.tracing import Tracing

CALLS = {path.encode(): path for path in ("/embed", "/cross-generate", "/v1/embeddings")}
TELL_SECONDS = 1.0
"""Refusals of so long a time share a line of the log."""

log = structlog.get_logger(__name__)


class Door:
    """For one event loop. Asks for no key: whoever comes is refused alike."""

    def __init__(self, bundles: Bundles, metrics: Metrics, tracing: Tracing) -> None:
        self._bundles = bundles
        self._metrics = metrics
        self._tracing = tracing
        self._entering = 0  # let in during this turn of the event loop: no other count has them yet
        self._refused = 0

    def refusal(self, method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Response | None:
        """The whole answer to a call that would be refused now; None where the application should see to it.

        Args:
            headers: their names in lower case.
        """
        path = CALLS.get(url.partition(b"?")[0])
        if path is None or method != b"POST":
            return None
        started = time.perf_counter()
        problem = self._bundles.refusal(self._entering)
        if problem is not None:
            return self._answer(problem, path, dict(headers), started)
        if not self._entering:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._entered)  # the turn after next begins when all of this turn's tasks have run
        self._entering += 1
        return None

    def _entered(self) -> None:
        self._entering = 0

    def _answer(self, problem: Problem, path: str, headers: dict[bytes, bytes], started: float) -> Response:
        request_id = identity(headers.get(b"x-request-id", b"").decode("latin-1"))
        trace = self._tracing.begin(headers.get(b"traceparent", b"").decode("latin-1"), "POST")
        state: dict[str, Any] = {"request_id": request_id, "code": problem.code}
        self._metrics.answered(path, problem.status, problem.code, time.perf_counter() - started)
        self._tracing.end(trace, f"POST {path}", state, problem.status)
        problem.headers["X-Request-Id"] = request_id
        problem.headers["X-Model-Version"] = self._bundles.choose(None).manifest.version
        if trace.header:
            problem.headers["traceparent"] = trace.header
        self._note(problem)
        return problem.answer(request_id, path)

    def _note(self, problem: Problem) -> None:
        if not self._refused:
            asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell, problem)
        self._refused += 1

    def _tell(self, first: Problem) -> None:
        log.warning("refused", requests=self._refused, code=first.code, reason=first.detail)
        self._refused = 0
