"""Trace headers with OpenTelemetry off, and what a collector receives with it on."""

import contextlib
import gzip
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.tracing import Tracing

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WORD = {"inputs": [{"word": "one"}]}
MADE = {"inputs": [{"word": "one"}], "refine": {"steps": 2}}


@contextlib.contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    """A collector: its address and the spans that it got."""
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()
            thread.join()


def attributes(span: Span) -> dict[str, str]:
    return {one.key: one.value.string_value or str(one.value.int_value) for one in span.attributes}


def test_off_the_header_is_passed_on_and_logged(client: httpx.Client) -> None:
    with structlog.testing.capture_logs() as logged:
        traced = client.post("/embed", json=WORD, headers={"traceparent": PARENT, "X-Request-Id": "traced"})
        untraced = client.post("/embed", json=WORD, headers={"X-Request-Id": "untraced"})
    assert traced.headers["traceparent"] == PARENT
    assert "traceparent" not in untraced.headers
    told = {entry["request_id"]: entry.get("trace_id") for entry in logged if entry["event"] == "answered"}
    assert told == {"traced": PARENT.split("-")[1], "untraced": None}


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
        PARENT + "\n",
    ],
)
def test_a_header_that_is_none_counts_as_none(header: str) -> None:
    trace = Tracing().begin(header, "POST")
    assert (trace.id, trace.header) == (None, None)


def test_on_a_collector_gets_a_span_of_the_call_and_of_each_stage(serve: Serve) -> None:
    with collecting() as (address, spans):
        before = time.time_ns()
        with serve(otel=address) as client:
            answer = client.post("/cross-generate", json=MADE, headers={"traceparent": PARENT, "X-Request-Id": "made"})
            client.post("/embed", json={"inputs": [{"word": "?"}]}, headers={"X-Request-Id": "bad"})
            client.get("/livez")
            client.get("/metrics")
        after = time.time_ns()
        calls = {attributes(span).get("concord.request_id"): span for span in spans if attributes(span)}
        assert set(calls) == {"made", "bad"}
        made, bad = calls["made"], calls["bad"]
        assert (made.name, made.kind, made.trace_id.hex()) == ("POST /cross-generate", Span.SPAN_KIND_SERVER, PARENT[3:35])
        assert made.parent_span_id.hex() == PARENT[36:52]
        assert attributes(made)["http.response.status_code"] == "200"
        assert answer.headers["traceparent"] == f"00-{made.trace_id.hex()}-{made.span_id.hex()}-01"
        stages = [span for span in spans if span.parent_span_id == made.span_id]
        assert {"decode", "encode", "refine", "generate"} <= {span.name for span in stages} <= {
            "decode", "queue", "encode", "refine", "generate"
        }  # fmt: skip
        stages.sort(key=lambda span: span.start_time_unix_nano)
        assert all(first.end_time_unix_nano <= then.start_time_unix_nano for first, then in itertools.pairwise(stages))
        slack = 5_000_000
        assert before < made.start_time_unix_nano < stages[0].start_time_unix_nano + slack
        assert stages[-1].end_time_unix_nano < made.end_time_unix_nano + slack
        assert made.end_time_unix_nano < after
        assert bad.parent_span_id == b""
        assert attributes(bad)["error.type"] == "bad_text"
        assert "one" not in str(spans), "nothing of what was sent"


def test_a_caller_who_does_not_sample_is_heard(serve: Serve) -> None:
    with collecting() as (address, spans):
        with serve(otel=address) as client:
            client.post("/embed", json=WORD, headers={"traceparent": PARENT[:-1] + "0"}).raise_for_status()
        assert spans == []


@pytest.mark.parametrize("collector", ["http://127.0.0.1:1", "http://collector.invalid:4318"], ids=["closed", "no name"])
def test_without_a_collector_calls_go_on(serve: Serve, collector: str) -> None:
    started = time.monotonic()
    with serve(otel=collector) as client:
        for _ in range(5):
            client.post("/embed", json=WORD).raise_for_status()
        ended = time.monotonic()
        assert ended - started < 30
    assert time.monotonic() - ended < 30, "and the server ends"


def test_off_nothing_of_it_is_loaded() -> None:
    script = (
        "import sys, service.__main__; print([m for m in sys.modules if m.startswith(('service.spans', 'opentelemetry.sdk'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_without_the_packages_the_service_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from service.tracing import TracingError, to\n"
        "try: to('http://127.0.0.1:4318')\n"
        "except TracingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'concord[otel]'" in done.stdout
