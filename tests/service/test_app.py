import contextlib
import threading
import time
from collections.abc import Callable

import httpx

from model.runtime import Runtime
from service.app import create
from service.settings import Settings


def test_apps_share_nothing(serve: Callable[..., contextlib.AbstractContextManager[httpx.Client]]) -> None:
    with serve() as one, serve(max_items=1) as other:
        two_items = {"inputs": [{"word": "one"}] * 2}
        assert one.post("/embed", json=two_items).status_code == 200
        assert other.post("/embed", json=two_items).status_code == 422
        counted = 'concord_request_duration_seconds_count{route="/embed",status="200"}'
        assert f"{counted} 1.0" in one.get("/metrics").text
        assert counted not in other.get("/metrics").text


def test_nothing_outlives_an_app(serve: Callable[..., contextlib.AbstractContextManager[httpx.Client]]) -> None:
    before = set(threading.enumerate())
    with serve() as client:
        client.post("/embed", json={"inputs": [{"word": "one"}] * 8})  # more than is decoded without a thread
        assert {"inference", "decode_0"} <= {thread.name for thread in set(threading.enumerate()) - before}
    deadline = time.monotonic() + 2
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_document_is_served(client: httpx.Client) -> None:
    served = client.get("/openapi.json").json()
    assert served == client.app.openapi()  # type: ignore[attr-defined]


def test_before_its_lifespan_an_app_is_not_ready(runtime: Runtime) -> None:
    app = create([runtime], Settings())
    checks = app.state.bundles.checks()
    assert checks["digits@" + runtime.bundle.manifest.version + "/golden"] != "ok"
    assert not app.state.bundles.ready()
