import threading

import httpx

from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.settings import Settings
from tests.support.metrics import scrape
from tests.support.server import Serve
from tests.support.waiting import wait_for


def test_app_settings_and_metrics_are_separate_between_apps(serve: Serve) -> None:
    with serve() as first, serve(max_items=1) as second:
        two_items = {"inputs": [{"word": "one"}] * 2}
        assert first.post("/embed", json=two_items).status_code == 200
        assert second.post("/embed", json=two_items).status_code == 422
        labels = {"route": "/embed", "status": "200"}
        assert scrape(first, "concord_request_duration_seconds_count", **labels) == 1
        assert scrape(second, "concord_request_duration_seconds_count", **labels) == 0


def test_app_shutdown_ends_its_threads(serve: Serve) -> None:
    before = set(threading.enumerate())
    with serve() as client:
        client.post("/embed", json={"inputs": [{"word": "one"}] * 8})  # too many items for the event loop: parsed in a thread
        assert {"inference", "parse_0"} <= {thread.name for thread in set(threading.enumerate()) - before}
    wait_for(lambda: not set(threading.enumerate()) - before, message="threads of the app are still alive")


def test_openapi_route_serves_the_generated_document(client: httpx.Client) -> None:
    served = client.get("/openapi.json").json()
    assert served == client.app.openapi()  # type: ignore[attr-defined]


def test_app_before_its_lifespan_is_not_ready(runtime: Runtime) -> None:
    app = create([runtime], Settings())
    checks = app.state.health.readiness()
    assert checks["digits@" + runtime.bundle.manifest.version + "/golden"] != "ok"
    assert not app.state.health.ready()
