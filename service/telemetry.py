"""What an operator sees: Prometheus metrics, and a JSON log line for each request that failed. Never what a request held."""

import asyncio
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Collection

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import CODES, Problem, respond
from service.settings import Settings
from service.tracing import Tracing
from service.work import Refinement

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_NATS = (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


def identity(asked: str) -> str:
    """Of a request: what its client calls it, where that does no harm, or a new one."""
    return asked if asked and _REQUEST_ID.fullmatch(asked) else f"{random.getrandbits(128):032x}"


class Metrics:
    """The metrics of one app, in a registry of its own. It observes the engine; labels take values of bounded sets only.

    Args:
        build: labels of ``concord_build_info``: versions.
    """

    def __init__(self, build: dict[str, str]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.duration = Histogram(
            "concord_request_duration_seconds",
            "From the first byte of a request to the first of its answer.",
            ("route", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("concord_requests_in_flight", "Requests that have no answer yet.", registry=registry)
        self.rejections = Counter("concord_rejections", "Requests and items without a result.", ("reason",), registry=registry)
        self.items = Counter("concord_items", "Items that got a result.", ("subset",), registry=registry)
        self.stages = Histogram("concord_stage_seconds", "Time by stage.", ("stage",), buckets=_SECONDS, registry=registry)
        self.waits = Histogram("concord_queue_wait_seconds", "Time in the queue.", buckets=_SECONDS, registry=registry)
        self.batches = Histogram("concord_batch_size", "Items in one run of a graph.", buckets=_COUNTS, registry=registry)
        self.steps = Histogram("concord_refine_steps", "Refinement steps of an item.", buckets=_COUNTS, registry=registry)
        self.gain = Histogram("concord_refine_gain_nats", "What refinement gained.", buckets=_NATS, registry=registry)
        self.stops = Counter("concord_refine_stops", "Why refinement ended.", ("reason",), registry=registry)
        self.depth = Gauge("concord_queue_depth", "Items that wait.", registry=registry)
        self.ready = Gauge("concord_ready", "1: every readiness check passes.", registry=registry)
        Info("concord_build", "What this process is made of.", registry=registry).info(build)

    def batch(self, size: int) -> None:
        self.batches.observe(size)

    def answered(self, route: str, status: int, code: str | None, seconds: float) -> None:
        """An answer begins; ``code`` says why it is no result."""
        self.duration.labels(route, status).observe(seconds)
        if code:
            self.rejections.labels(code).inc()

    def stage(self, name: str, seconds: float) -> None:
        self.stages.labels(name).observe(seconds)

    def waited(self, seconds: float) -> None:
        self.waits.observe(seconds)

    def refined(self, refinement: Refinement) -> None:
        self.steps.observe(refinement.steps)
        self.gain.observe(refinement.after - refinement.before)
        self.stops.labels(refinement.stopped).inc()

    def watch(self, queue_depth: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Ask these at each scrape."""
        self.depth.set_function(queue_depth)
        self.ready.set_function(ready)

    def expose(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)


class Telemetry:
    """Outermost: gives each request its id, times and counts it, and turns what nobody caught into a 500 that tells nothing.

    The state of the scope carries ``request_id`` to the handlers, and ``code`` back from them where a request failed.

    Args:
        routes: paths to name in the metrics where a request is refused before it reaches its route.
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = identity(headers.get("x-request-id", ""))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["trace"] = trace = self.tracing.begin(headers.get("traceparent", ""), scope["method"])
        state["task"] = asyncio.current_task()  # which the connection cancels when the client goes
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": request_id, "x-model-version": state.get("model_version") or self.model_version()}
                if trace.header:
                    more["traceparent"] = trace.header
                message["headers"] += [(name.encode(), value.encode()) for name, value in more.items()]
                self._record(scope, status, time.perf_counter() - started)
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, observed)
            except asyncio.CancelledError:
                # Not raised again: the task ends here, and what is above would log it as a fault.
                if state.get("gone"):
                    state["code"] = "client_gone"
                    if not status:
                        self._record(scope, CODES["client_gone"][0], time.perf_counter() - started)
                elif not status:
                    stopping = Problem("not_ready", "the server is stopping: ask another one", retry_after_ms=1000)
                    await respond(scope, stopping)(scope, receive, observed)
            except Exception as error:
                # The message may quote the request, so the log gets the place alone.
                log.error("request broke", request_id=request_id, error=type(error).__name__, at=_place(error))
                if status:
                    raise Interrupted from None
                answer = respond(scope, Problem("internal", "the server failed: report the request id"))
                await answer(scope, receive, observed)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        known = scope["path"] if scope["path"] in self.routes else "unmatched"
        route = str(getattr(scope.get("route"), "path", known))
        state = scope["state"]
        code = state.get("code")
        self.metrics.answered(route, status, code, seconds)
        self.tracing.end(state["trace"], f"{scope['method']} {route}", state, status)
        fault = status >= 500 and code != "queue_full"  # which is no fault of anybody's, and comes in thousands
        write = log.debug if status < 400 else log.error if fault else log.info
        write(
            "answered",
            request_id=state["request_id"],
            method=scope["method"],
            route=route,
            status=status,
            code=code,
            ms=round(1000 * seconds, 2),
            **{name: value for name, value in (("key", state.get("key")), ("trace_id", state["trace"].id)) if value},
        )


class Interrupted(Exception):  # noqa: N818
    """An answer broke off after its first byte: all that is left is to close the connection."""


def _place(error: BaseException) -> list[str]:
    """Where it was raised: file, line and function of the innermost frames."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return frames[-6:]


def configure_logging(settings: Settings) -> None:
    """One line an event to stdout, ours and uvicorn's, as JSON or as text. A log that cannot be written fails no request."""
    logging.raiseExceptions = False
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if settings.log_format == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
        )
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.getLogger("service").setLevel(level)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
