"""Traces: the W3C header is passed on and logged; spans are made by ``service.spans`` where a collector is named."""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

HEADER = re.compile(r"00-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})")
"""``traceparent``, as W3C has it."""


class TracingError(RuntimeError):
    """Traces are asked for and cannot be made."""


@dataclass(slots=True)
class Trace:
    """One request's. ``id`` is for the log, ``header`` for the answer; None where the request has none and none is made."""

    id: str | None
    header: str | None
    span: Any = None


class Tracing:
    """What came is passed on, and nothing is sent anywhere."""

    def begin(self, traceparent: str, method: str) -> Trace:  # noqa: ARG002
        """The trace that a request with this header belongs to. A header that is none counts as none."""
        found = HEADER.fullmatch(traceparent)
        return Trace(found["trace"], traceparent) if found else Trace(None, None)

    def end(self, trace: Trace, name: str, state: Mapping[str, Any], status: int) -> None:
        """The answer begins.

        Args:
            state: of the request: ``spent``, seconds by stage, from ``submitted_ns`` on the wall clock; and ``code``.
        """

    @contextlib.asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """What is left is sent when this ends."""
        yield


def to(collector: str | None) -> Tracing:
    """Spans for the collector at this address; none without one.

    Raises:
        TracingError: OpenTelemetry is not installed.
    """
    if collector is None:
        return Tracing()
    try:
        from service.spans import OpenTelemetry  # noqa: PLC0415 - an extra of its own
    except ImportError as error:
        told = "CONCORD_OTEL names a collector, but OpenTelemetry is not installed: pip install 'concord[otel]'"
        raise TracingError(told) from error
    return OpenTelemetry(collector)
