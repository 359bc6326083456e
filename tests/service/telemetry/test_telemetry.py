"""Metrics, request ids and the response to unexpected errors."""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Iterator

import httpx
import prometheus_client
import pytest
import structlog
from starlette.types import Receive, Scope, Send

from concord.service.api import responses
from concord.service.settings import Settings
from concord.service.telemetry.logs import configure_logging
from concord.service.telemetry.metrics import Histogram, Metrics
from concord.service.telemetry.middleware import Interrupted, Telemetry
from tests.support.metrics import scrape, value


def test_requests_are_counted_by_route_and_status(client: httpx.Client) -> None:
    ok = {"route": "/embed", "status": "200"}
    not_found = {"route": "/v1/models/{model}", "status": "404"}
    before = [scrape(client, "concord_request_duration_seconds_count", **labels) for labels in (ok, not_found)]
    client.post("/embed", json={"inputs": [{"word": "one"}]})
    for name in ("a", "b", "c"):
        client.get(f"/v1/models/{name}")
    after = [scrape(client, "concord_request_duration_seconds_count", **labels) for labels in (ok, not_found)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 3]
    assert scrape(client, "concord_requests_in_flight") == 1, "the scrape itself"


def test_items_stages_and_refinement_are_counted(client: httpx.Client) -> None:
    subset = {"subset": "word"}
    metrics = [
        ("concord_items_total", subset),
        ("concord_rejections_total", {"reason": "bad_text"}),
        ("concord_rejections_total", {"reason": "empty_subset"}),
        ("concord_refine_stops_total", {"reason": "steps"}),
        ("concord_refine_steps_sum", {}),
        ("concord_refine_gain_nats_count", {}),
        ("concord_queue_wait_seconds_count", {}),
        ("concord_batch_size_sum", {}),
    ]
    before = [scrape(client, name, **labels) for name, labels in metrics]
    client.post("/embed", json={"inputs": [{"word": "one"}, {"word": "?"}], "on_error": "partial", "refine": {"steps": 3}})
    client.post("/embed", json={"inputs": [{}]})
    after = [scrape(client, name, **labels) for name, labels in metrics]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1, 3, 1, 1, 1]
    client.post("/cross-generate", json={"inputs": [{"word": "one"}]})
    for stage in ("decode", "encode", "refine", "generate", "serialize"):
        assert scrape(client, "concord_stage_seconds_count", stage=stage) > 0


def test_requests_cannot_add_label_values(client: httpx.Client) -> None:
    def series() -> int:
        lines = client.get("/metrics").text.splitlines()
        return sum(not line.startswith("#") for line in lines)

    def send_unusual(number: int) -> None:
        client.get(f"/nowhere/{number}")
        client.request(("PUT", "PATCH", "LOCK", "COPY", "MOVE", "PURGE")[number], "/embed")
        client.post("/embed", json={"inputs": [{f"m{number}": 1}]})
        client.post("/embed", json={"inputs": [{"word": "one"}], "model": f"m{number}"})

    send_unusual(0)
    before = series()
    for number in range(1, 6):
        send_unusual(number)
    assert series() == before


@pytest.mark.parametrize("request_id", ["a", "01J.x_y-z", "f" * 128])
def test_valid_request_id_is_echoed(client: httpx.Client, request_id: str) -> None:
    assert client.get("/livez", headers={"X-Request-Id": request_id}).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "f" * 129, "a b", 'a"b', "a\tb", "é"])
def test_invalid_request_id_is_replaced(client: httpx.Client, request_id: str) -> None:
    new_id = client.get("/livez", headers={"X-Request-Id": request_id.encode("latin-1")}).headers["x-request-id"]
    assert new_id != request_id
    assert len(new_id) == 32


def test_every_response_names_the_model_version(client: httpx.Client) -> None:
    version = client.get("/v1/models").json()["data"][0]["version"]
    for path in ("/livez", "/nowhere", "/embed"):
        assert client.get(path).headers["x-model-version"] == version


def failing_app(started: bool) -> Telemetry:
    """Return an app that raises an error, before its response or after the start of it."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("the word was swordfish")

    return Telemetry(app, Metrics({"version": "0"}), lambda: "1")


def get(app: Telemetry) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/", headers={"X-Request-Id": "abc"})

    return asyncio.run(run())


@contextlib.contextmanager
def service_logging() -> Iterator[None]:
    """Log as the service does in this context."""
    root, raising = logging.getLogger(), logging.raiseExceptions
    handlers, level = root.handlers, root.level
    root.handlers = []
    configure_logging(Settings())
    yield
    structlog.reset_defaults()
    root.handlers, logging.raiseExceptions = handlers, raising
    root.setLevel(level)


def test_unexpected_error_becomes_a_500_without_details(capsys: pytest.CaptureFixture[str]) -> None:
    app = failing_app(started=False)
    with service_logging():
        response = get(app)
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert response.json()["instance"] == "urn:request:abc"
    assert "swordfish" not in response.text
    assert "ValueError" not in response.text
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["request_id"] for line in lines] == ["abc", "abc"]
    assert lines[0]["error"] == "ValueError"
    assert any("test_telemetry.py" in place for place in lines[0]["at"])
    assert "swordfish" not in str(lines)
    assert value(app.metrics.expose().decode(), "concord_rejections_total", reason="internal") == 1


def test_interrupted_response_is_not_followed_by_another() -> None:
    app = failing_app(started=True)
    with pytest.raises(Interrupted):
        get(app)
    assert value(app.metrics.expose().decode(), "concord_requests_in_flight") == 0


def test_internal_error_has_the_shape_of_its_route(
    client: httpx.Client, values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "_vector", None)
    for path, body in (("/embed", {"inputs": [values]}), ("/v1/embeddings", {"input": [values]})):
        response = client.post(path, json=body)  # validated against the OpenAPI document
        error = response.json().get("error", response.json())
        assert (response.status_code, error["code"]) == (500, "internal")
        assert "NoneType" not in response.text
    monkeypatch.undo()
    assert client.post("/embed", json={"inputs": [values]}).status_code == 200


def test_histogram_exposes_what_that_of_prometheus_client_does() -> None:
    """Apart from the time when a series began, which Prometheus does not use."""
    expositions = []
    for make in (Histogram, prometheus_client.Histogram):
        registry = prometheus_client.CollectorRegistry()
        histogram = make("seconds", "Of a run.", ("stage",), buckets=(0.5, 1, 10), registry=registry)
        for seconds in (0.1, 0.5, 0.6, 10, 11):
            histogram.labels("encode").observe(seconds)
        histogram.labels("refine")
        text = prometheus_client.generate_latest(registry).decode()
        expositions.append([line for line in text.splitlines() if "_created" not in line])
    assert expositions[0] == expositions[1]
    assert 'seconds_bucket{le="1.0",stage="encode"} 3.0' in expositions[0]


def test_histogram_counts_all_observations_of_several_threads() -> None:
    registry = prometheus_client.CollectorRegistry()
    series = Histogram("seconds", "Of a run.", buckets=(1,), registry=registry).labels()

    def observe() -> None:
        for _ in range(20_000):
            series.observe(2.0)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buckets, total = series.collect()
    assert (buckets, total) == ([("1.0", 0), ("+Inf", 80_000)], 160_000.0)
