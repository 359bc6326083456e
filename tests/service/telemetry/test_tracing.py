"""Trace headers without OpenTelemetry, and the spans that a collector receives with it."""

import contextlib
import gzip
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import httpx
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from concord.model.installation import not_installed
from concord.service.telemetry.tracing import Tracing, trace_header, trace_id
from tests.support.http_servers import serving
from tests.support.server import Serve

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EMBED = {"inputs": [{"word": "one"}]}
GENERATE = {"inputs": [{"word": "one"}], "refine": {"steps": 2}}


@contextlib.contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    """Run a collector. Yields its URL and the spans that it receives."""
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                content = gzip.decompress(content)
            assert self.path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with serving(Collector) as url:
        yield url, spans


def attributes(span: Span) -> dict[str, str]:
    return {a.key: a.value.string_value or str(a.value.int_value) for a in span.attributes}


def test_traceparent_is_passed_on_and_logged_without_a_collector(client: httpx.Client) -> None:
    with structlog.testing.capture_logs() as logged:
        traced = client.post("/embed", json=EMBED, headers={"traceparent": PARENT, "X-Request-Id": "traced"})
        untraced = client.post("/embed", json=EMBED, headers={"X-Request-Id": "untraced"})
    assert traced.headers["traceparent"] == PARENT
    assert "traceparent" not in untraced.headers
    traces = {entry["request_id"]: entry.get("trace_id") for entry in logged if entry["event"] == "response"}
    assert traces == {"traced": PARENT.split("-")[1], "untraced": None}


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        PARENT.upper(),
        PARENT + "-more",
        PARENT.replace("00-", "ff-", 1),
        PARENT[:-1],
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{'a' * 32}-{'0' * 16}-01",
    ],
)
def test_invalid_traceparent_is_ignored(header: str) -> None:
    span = Tracing().begin(header, "POST")
    assert (trace_id(span), trace_header(span)) == (None, None)


def test_collector_gets_a_span_of_the_request_and_of_each_stage(serve: Serve) -> None:
    with collecting() as (url, spans):
        before = time.time_ns()
        with serve(otel=url) as client:
            response = client.post("/cross-generate", json=GENERATE, headers={"traceparent": PARENT, "X-Request-Id": "valid"})
            client.post("/embed", json={"inputs": [{"word": "?"}]}, headers={"X-Request-Id": "invalid"})
            client.get("/livez")
            client.get("/metrics")
        after = time.time_ns()
        requests = {attributes(span).get("concord.request_id"): span for span in spans if attributes(span)}
        assert set(requests) == {"valid", "invalid"}
        valid, invalid = requests["valid"], requests["invalid"]
        assert (valid.name, valid.kind, valid.trace_id.hex()) == ("POST /cross-generate", Span.SPAN_KIND_SERVER, PARENT[3:35])
        assert valid.parent_span_id.hex() == PARENT[36:52]
        assert attributes(valid)["http.response.status_code"] == "200"
        assert response.headers["traceparent"] == f"00-{valid.trace_id.hex()}-{valid.span_id.hex()}-01"
        stages = [span for span in spans if span.parent_span_id == valid.span_id]
        assert {"decode", "encode", "refine", "generate"} <= {span.name for span in stages} <= {
            "decode", "queue", "encode", "refine", "generate"
        }  # fmt: skip
        stages.sort(key=lambda span: span.start_time_unix_nano)
        assert all(first.end_time_unix_nano <= second.start_time_unix_nano for first, second in itertools.pairwise(stages))
        slack = 5_000_000  # nanoseconds: the stages are measured by another clock
        assert before < valid.start_time_unix_nano < stages[0].start_time_unix_nano + slack
        assert stages[-1].end_time_unix_nano < valid.end_time_unix_nano + slack
        assert valid.end_time_unix_nano < after
        assert invalid.parent_span_id == b""
        assert attributes(invalid)["error.type"] == "bad_text"
        assert "one" not in str(spans), "the spans hold the input"


def test_unsampled_request_sends_no_spans(serve: Serve) -> None:
    with collecting() as (url, spans):
        with serve(otel=url) as client:
            client.post("/embed", json=EMBED, headers={"traceparent": PARENT[:-1] + "0"}).raise_for_status()
        assert spans == []


@pytest.mark.slow
@pytest.mark.parametrize("collector", ["http://127.0.0.1:1", "http://collector.invalid:4318"], ids=["closed", "no name"])
def test_unreachable_collector_does_not_affect_requests(serve: Serve, collector: str) -> None:
    """One failing export takes several seconds, because it is retried."""

    def send_requests(client: httpx.Client) -> float:
        began = time.monotonic()
        for _ in range(5):
            client.post("/embed", json=EMBED).raise_for_status()
        return time.monotonic() - began

    with serve() as client:
        without_collector = send_requests(client)
    with serve(otel=collector) as client:
        assert send_requests(client) < 10 + 20 * without_collector, "requests wait for the export"
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 60, "the server does not stop"


def test_sdk_is_not_loaded_without_a_collector() -> None:
    names = ("opentelemetry.sdk", "opentelemetry.exporter")
    script = f"import sys, concord.service.cli; print([m for m in sys.modules if m.startswith({names!r})])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_missing_sdk_names_the_extra() -> None:
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from concord.service.telemetry.tracing import TracingError, tracing_to\n"
        "try: tracing_to('http://127.0.0.1:4318')\n"
        "except TracingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == not_installed("OpenTelemetry's SDK", "CONCORD_OTEL", "otel") + "\n"
