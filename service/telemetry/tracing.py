"""Traces by OpenTelemetry: the caller's trace is passed on and logged; spans are recorded where a collector is configured.

OpenTelemetry's own environment variables configure the sampler, the resource and the exporter's headers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from concord.model.installation import not_installed
from concord.service.request_state import RequestState

STAGES = ("decode", "queue", "features", "encode", "refine", "generate")
"""In the order in which an item passes them."""
_PROPAGATOR = TraceContextTextMapPropagator()


class TracingError(RuntimeError):
    """A collector is configured and OpenTelemetry's SDK is not installed."""


class Tracing:
    """A span of each POST request and a child span of each of its stages; none of health checks and scrapes.

    Args:
        provider: records the spans. None: nothing is recorded, and the caller's trace is passed on.
        shutdown: sends what is left.
    """

    def __init__(self, provider: TracerProvider | None = None, shutdown: Callable[[], None] = lambda: None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("concord")
        self._shutdown = shutdown

    def begin(self, traceparent: str, method: str) -> Span:
        """The span of a request, or that of its caller where none is recorded. An invalid header counts as none."""
        context = _PROPAGATOR.extract({"traceparent": traceparent}, Context()) if traceparent else None
        if self._tracer is None or method != "POST":
            return trace.INVALID_SPAN if context is None else trace.get_current_span(context)
        return self._tracer.start_span(method, context=context or Context(), kind=SpanKind.SERVER)

    def end(self, name: str, state: RequestState, status: int) -> None:
        """Record the span and its stages, when the response begins."""
        span = state.span
        if self._tracer is None or not span.is_recording():
            return
        span.update_name(name)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("concord.request_id", state.request_id)
        if state.error_code:
            span.set_attribute("error.type", state.error_code)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        context = trace.set_span_in_context(span)
        for stage, began, ended in _stages(state):
            self._tracer.start_span(stage, context=context, start_time=began).end(ended)
        span.end()

    @contextlib.asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Sends what is left when this ends."""
        try:
            yield
        finally:
            await asyncio.to_thread(self._shutdown)


def tracing_to(collector: str | None) -> Tracing:
    """Traces for the OTLP collector at this address (spans go to /v1/traces below it); None records nothing.

    Raises:
        TracingError: OpenTelemetry's SDK is not installed.
    """
    if collector is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider as Provider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        raise TracingError(not_installed("OpenTelemetry's SDK", "CONCORD_OTEL", "otel")) from error
    resource = Resource.create({"service.name": "concord", "service.version": version("concord-mvae")})
    provider = Provider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{collector.rstrip('/')}/v1/traces")))
    return Tracing(provider, provider.shutdown)


def trace_id(span: Span) -> str | None:
    """For the log; None where the request has no trace."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def trace_header(span: Span) -> str | None:
    """``traceparent`` of the response; None where the request has no trace."""
    headers: dict[str, str] = {}
    if span.get_span_context().is_valid:
        _PROPAGATOR.inject(headers, trace.set_span_in_context(span))
    return headers.get("traceparent")


def _stages(state: RequestState) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each, in nanoseconds. The steps of a refinement take turns with those of other rows: its span is
    as long as they took together."""
    at = (state.submitted_ns or time.time_ns()) - int(1e9 * state.stage_seconds.get("decode", 0))
    for stage in STAGES:
        if state.stage_seconds.get(stage):
            ended = at + int(1e9 * state.stage_seconds[stage])
            yield stage, at, ended
            at = ended
