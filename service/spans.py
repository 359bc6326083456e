"""OpenTelemetry: a span of each call and within it one of each stage, sent to a collector as OTLP over HTTP.

OpenTelemetry's own environment variables count for the sampler, the resource and the exporter's headers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from service.tracing import HEADER, Trace, Tracing

STAGES = ("decode", "queue", "encode", "refine", "generate")
"""In the order in which an item passes them."""


class OpenTelemetry(Tracing):
    """Spans of what is posted, and of nothing that probes and scrapers ask.

    Args:
        collector: its address; spans go to ``/v1/traces`` below it.
    """

    def __init__(self, collector: str) -> None:
        resource = Resource.create({"service.name": "concord", "service.version": version("concord")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{collector.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("concord")

    def begin(self, traceparent: str, method: str) -> Trace:
        if method != "POST":
            return super().begin(traceparent, method)
        span = self._tracer.start_span(method, context=_parent(traceparent), kind=api.SpanKind.SERVER)
        own = span.get_span_context()
        trace_id = f"{own.trace_id:032x}"
        return Trace(trace_id, f"00-{trace_id}-{own.span_id:016x}-{own.trace_flags:02x}", span)

    def end(self, trace: Trace, name: str, state: Mapping[str, Any], status: int) -> None:
        if trace.span is None:
            return
        span: api.Span = trace.span
        span.update_name(name)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("concord.request_id", state["request_id"])
        if state.get("code"):
            span.set_attribute("error.type", state["code"])
        if status >= 500:
            span.set_status(api.StatusCode.ERROR)
        within = api.set_span_in_context(span)
        for stage, began, ended in _stages(state):
            self._tracer.start_span(stage, context=within, start_time=began).end(ended)
        span.end()

    @contextlib.asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(self._provider.shutdown)


def _parent(traceparent: str) -> Context | None:
    found = HEADER.fullmatch(traceparent)
    if found is None:
        return None
    flags = api.TraceFlags(int(found["flags"], 16))
    caller = api.SpanContext(int(found["trace"], 16), int(found["span"], 16), is_remote=True, trace_flags=flags)
    return api.set_span_in_context(api.NonRecordingSpan(caller), Context())


def _stages(state: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each, in nanoseconds. A refinement's steps take turns with those of other rows: it is drawn as
    long as they took together."""
    spent: Mapping[str, float] = state.get("spent", {})
    at = state.get("submitted_ns", time.time_ns()) - int(1e9 * spent.get("decode", 0))
    for stage in STAGES:
        if spent.get(stage):
            ended = at + int(1e9 * spent[stage])
            yield stage, at, ended
            at = ended
