import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from service import answers
from service.settings import Settings
from service.telemetry import Interrupted, Metrics, Telemetry, configure_logging


def metrics() -> Metrics:
    return Metrics({"version": "0"})


def value(text: str, name: str, **labels: str) -> float:
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def scrape(client: httpx.Client, name: str, **labels: str) -> float:
    return value(client.get("/metrics").text, name, **labels)


def test_requests_are_counted_by_route_and_status(client: httpx.Client) -> None:
    ok = {"route": "/embed", "status": "200"}
    bad = {"route": "/v1/models/{model}", "status": "404"}
    before = [scrape(client, "concord_request_duration_seconds_count", **labels) for labels in (ok, bad)]
    client.post("/embed", json={"inputs": [{"word": "one"}]})
    for name in ("a", "b", "c"):
        client.get(f"/v1/models/{name}")
    after = [scrape(client, "concord_request_duration_seconds_count", **labels) for labels in (ok, bad)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 3]
    assert scrape(client, "concord_requests_in_flight") == 1, "the scrape itself"


def test_the_work_is_counted(client: httpx.Client) -> None:
    subset = {"subset": "word"}
    counted = [
        ("concord_items_total", subset),
        ("concord_rejections_total", {"reason": "bad_text"}),
        ("concord_rejections_total", {"reason": "empty_subset"}),
        ("concord_refine_stops_total", {"reason": "steps"}),
        ("concord_refine_steps_sum", {}),
        ("concord_refine_gain_nats_count", {}),
        ("concord_queue_wait_seconds_count", {}),
        ("concord_batch_size_sum", {}),
    ]
    before = [scrape(client, name, **labels) for name, labels in counted]
    client.post("/embed", json={"inputs": [{"word": "one"}, {"word": "?"}], "on_error": "partial", "refine": {"steps": 3}})
    client.post("/embed", json={"inputs": [{}]})
    after = [scrape(client, name, **labels) for name, labels in counted]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1, 3, 1, 1, 1]
    client.post("/cross-generate", json={"inputs": [{"word": "one"}]})
    for stage in ("decode", "encode", "refine", "generate", "serialize"):
        assert scrape(client, "concord_stage_seconds_count", stage=stage) > 0


def test_no_caller_can_add_a_label(client: httpx.Client) -> None:
    def series() -> int:
        lines = client.get("/metrics").text.splitlines()
        return sum(not line.startswith("#") for line in lines)

    def knock(number: int) -> None:
        client.get(f"/nowhere/{number}")
        client.request(("PUT", "PATCH", "LOCK", "COPY", "MOVE", "PURGE")[number], "/embed")
        client.post("/embed", json={"inputs": [{f"m{number}": 1}]})
        client.post("/embed", json={"inputs": [{"word": "one"}], "model": f"m{number}"})

    knock(0)
    before = series()
    for number in range(1, 6):
        knock(number)
    assert series() == before


@pytest.mark.parametrize("good", ["a", "01J.x_y-z", "f" * 128])
def test_a_good_request_id_is_echoed(client: httpx.Client, good: str) -> None:
    assert client.get("/livez", headers={"X-Request-Id": good}).headers["x-request-id"] == good


@pytest.mark.parametrize("bad", ["", "f" * 129, "a b", 'a"b', "a\tb", "é"])
def test_a_bad_request_id_is_replaced(client: httpx.Client, bad: str) -> None:
    made = client.get("/livez", headers={"X-Request-Id": bad.encode("latin-1")}).headers["x-request-id"]
    assert made != bad
    assert len(made) == 32


def test_every_answer_names_the_version(client: httpx.Client) -> None:
    version = client.get("/v1/models").json()["data"][0]["version"]
    for path in ("/livez", "/nowhere", "/embed"):
        assert client.get(path).headers["x-model-version"] == version


def broken(started: bool) -> Telemetry:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("the word was swordfish")

    return Telemetry(app, metrics(), lambda: "1")


def get(app: Telemetry) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/", headers={"X-Request-Id": "abc"})

    return asyncio.run(run())


@contextlib.contextmanager
def logging_as_served() -> Iterator[None]:
    root, raising = logging.getLogger(), logging.raiseExceptions
    handlers, level = root.handlers, root.level
    root.handlers = []
    configure_logging(Settings())
    yield
    structlog.reset_defaults()
    root.handlers, logging.raiseExceptions = handlers, raising
    root.setLevel(level)


def test_what_nobody_caught_becomes_a_500_that_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    app = broken(started=False)
    with logging_as_served():
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


def test_an_answer_that_broke_off_is_not_followed_by_another() -> None:
    app = broken(started=True)
    with pytest.raises(Interrupted):
        get(app)
    assert value(app.metrics.expose().decode(), "concord_requests_in_flight") == 0


def test_a_fault_of_ours_is_a_500_in_the_shape_of_its_route(
    client: httpx.Client, values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the whole application, between the inference and the answer."""
    monkeypatch.setattr(answers, "_vector", None)
    for path, body in (("/embed", {"inputs": [values]}), ("/v1/embeddings", {"input": [values]})):
        response = client.post(path, json=body)  # held against the document
        told = response.json().get("error", response.json())
        assert (response.status_code, told["code"]) == (500, "internal")
        assert "NoneType" not in response.text
    monkeypatch.undo()
    assert client.post("/embed", json={"inputs": [values]}).status_code == 200
