"""Several worker processes behind one port: the same results, one set of metrics and quotas, and faults of single workers."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from concord.model import bundle
from tests.support.bundles import cut_short, write_copy
from tests.support.server import EMBED, ROOT, Service, running, start
from tests.support.traffic import Connections, mixed_requests
from tests.support.waiting import wait_for
from tests.tools.load import kill_under_load, reload_under_load, sigterm_once

pytestmark = pytest.mark.slow
COUNT = 2


@pytest.fixture(scope="module")
def workers() -> Iterator[Service]:
    with running("--workers", str(COUNT), CONCORD_HEARTBEAT_MS="1000") as service:
        service.wait_for_workers(COUNT)
        yield service


def embed_on_new_connection(service: Service, **headers: str) -> httpx.Response:
    """Send a small request over a connection that no other request uses."""
    with httpx.Client(base_url=service.client.base_url, trust_env=False, timeout=60) as client:
        return client.post("/embed", json=EMBED, headers=headers)


def levels(image: dict[str, str]) -> list[int]:
    """Return the levels of all pixels of a generated picture."""
    return [*Image.open(io.BytesIO(base64.b64decode(image["data"]))).tobytes()]


def connections_of_each_worker(service: Service) -> dict[int, int]:
    """Return the number of sockets that each worker has open."""
    return {
        number: sum(
            os.readlink(entry).startswith("socket:")  # noqa: PTH115
            for entry in map(str, Path(f"/proc/{pid}/fd").iterdir())
        )
        for number, pid in service.workers().items()
    }


def test_results_of_workers_are_those_of_one_process(workers: Service) -> None:
    """One request at a time, so that batches are the same: byte for byte. Then 16 at a time, over all workers."""
    requests = mixed_requests(count=24)

    async def send_all(port: int) -> list[bytes]:
        async with Connections(port) as connections:
            return [(await connections.send(request)).body for request in requests]

    async def send_together(port: int) -> list[bytes]:
        async with Connections(port) as connections:
            return [one.body for one in await asyncio.gather(*(connections.send(request) for request in requests))]

    with running() as single:
        expected = asyncio.run(send_all(single.port))
    assert asyncio.run(send_all(workers.port)) == expected
    for body, alone in zip(asyncio.run(send_together(workers.port)), expected, strict=True):
        result, reference = (json.loads(one)["data"][0] for one in (body, alone))
        assert result.get("embedding") == pytest.approx(reference.get("embedding"), abs=1e-5)
        pictures = [
            [level for value in one.get("generated", {}).get("digit", ()) for level in levels(value)]
            for one in (result, reference)
        ]
        assert pictures[0] == pytest.approx(pictures[1], abs=1), "batches round otherwise, by one level at most"


def test_connections_are_shared_evenly(workers: Service) -> None:
    before = connections_of_each_worker(workers)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=workers.client.base_url, trust_env=False)) for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            assert {response.status_code for response in pool.map(lambda c: c.post("/embed", json=EMBED), clients)} == {200}
        opened = [count - before[number] for number, count in connections_of_each_worker(workers).items()]
    assert sum(opened) >= 16
    assert min(opened) >= 4, opened


def test_killed_worker_takes_only_its_own_requests_with_it_and_is_replaced(workers: Service) -> None:
    """``python -m tests.tools.load kill`` does this 20 times. Counters do not go backwards, and health checks pass."""
    embedded = workers.metric("concord_request_duration_seconds_count", route="/embed", status="200")
    restarts = workers.metric("concord_worker_restarts_total")
    result = asyncio.run(kill_under_load(workers, rate=30.0))
    assert set(result["outcomes"]) <= {"200", "reset"}, result
    assert result["late_faults"] == 0, result
    assert workers.metric("concord_request_duration_seconds_count", route="/embed", status="200") >= embedded
    assert workers.metric("concord_worker_restarts_total") == restarts + 1
    assert workers.metric("concord_workers") == COUNT
    assert workers.client.get("/readyz").json()["checks"] == {"accepting": "ok", "workers": "ok"}
    assert workers.client.get("/livez").json()["checks"] == {"supervisor": "ok"}


def test_hanging_worker_is_killed_and_replaced(workers: Service) -> None:
    number, pid = min(workers.workers().items())
    os.kill(pid, signal.SIGSTOP)
    workers.wait_for(lambda: workers.workers()[number] != pid)
    assert [line["worker"] for line in workers.log_lines() if line["event"] == "worker killed"] == [number]
    assert {embed_on_new_connection(workers).status_code for _ in range(8)} == {200}


def test_metrics_count_the_requests_of_all_workers(workers: Service) -> None:
    name, labels = "concord_items_total", {"subset": "word"}
    before = workers.metric(name, **labels)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: embed_on_new_connection(workers), range(24)))
    assert {workers.metric(name, **labels) - before for _ in range(4)} == {24.0}, "it depends on the worker that is met"
    assert workers.metric("concord_ready") == 1
    assert workers.metric("concord_bundle_info") == 1


def test_sigterm_under_load_with_workers_loses_no_request() -> None:
    """``python -m tests.tools.load sigterm --workers 2`` does this 20 times."""
    result = asyncio.run(sigterm_once(rate=40.0, seconds=1.0, delay_ms=800, workers=COUNT))
    assert set(result["outcomes"]) == {"200"}, result
    assert result["outcomes"]["200"] > 20
    assert result["status"] == 0


FAIL_TO_LOAD = """
import os, pathlib
from concord.model.bundle import BundleError
from concord.model.runtime import Runtime

load, order = Runtime.load.__func__, pathlib.Path({file!r})


def load_or_fail(cls, path, **options):
    if order.exists() and order.read_text() == str(os.getpid()):
        raise BundleError("no memory is left")
    return load(cls, path, **options)


Runtime.load = classmethod(load_or_fail)
"""


def test_reload_under_load_replaces_the_bundle_in_all_workers_or_in_none(tmp_path: Path) -> None:
    folder = write_copy(tmp_path / "served", version="start").path
    (tmp_path / "sitecustomize.py").write_text(FAIL_TO_LOAD.format(file=str(tmp_path / "fails")))
    environment = {"CONCORD_WATCH_SECONDS": "0", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with running("--workers", str(COUNT), "--bundle", str(folder), **environment) as service:
        workers = service.wait_for_workers(COUNT)
        result = asyncio.run(reload_under_load(service, folder, count=4, rate=20.0))
        assert result["reloads"] == 4
        assert set(result["outcomes"]) == {"200"}, result

        def served() -> set[str]:
            return {embed_on_new_connection(service).json()["model_version"] for _ in range(8)}

        (tmp_path / "fails").write_text(str(workers[2]))
        write_copy(folder, version="6.0")
        service.process.send_signal(signal.SIGHUP)
        service.wait_for(lambda: any(line.get("reason") == "no memory is left" for line in service.log_lines()))
        assert served() == {"2.0"}, "one worker could not load it"
        assert service.metric("concord_bundle_state", state="failed") == 1
        (tmp_path / "fails").unlink()
        service.process.send_signal(signal.SIGHUP)
        service.wait_for(lambda: served() == {"6.0"})
        assert service.workers() == workers


def test_quota_counts_once_whichever_worker_is_met(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 20 + " ada 0.01\n")
    with running("--workers", str(COUNT), CONCORD_API_KEYS_FILE=str(keys), CONCORD_MAX_ITEMS="10") as service:
        service.wait_for_workers(COUNT)
        with ThreadPoolExecutor(8) as pool:
            responses = list(
                pool.map(lambda _: embed_on_new_connection(service, Authorization="Bearer " + "k" * 20), range(30))
            )
        statuses = [response.status_code for response in responses]
        assert (statuses.count(200), statuses.count(429)) == (10, 20)


def test_supervisor_ends_when_no_worker_starts_any_more(tmp_path: Path) -> None:
    folder = write_copy(tmp_path / "served").path
    with running("--workers", str(COUNT), "--bundle", str(folder)) as service:
        workers = service.wait_for_workers(COUNT)
        cut_short(folder)
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        assert service.process.wait(timeout=120) == 1
        assert [line["event"] for line in service.log_lines()].count("all workers failed") == 1


def test_first_worker_that_fails_ends_the_service_with_its_message(tmp_path: Path) -> None:
    cut_short(write_copy(tmp_path / "served").path, bundle.MANIFEST)
    process = start("--port", "0", "--workers", "2", "--bundle", str(tmp_path / "served"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(tmp_path / "served") in err
    assert "Traceback" not in out + err


def test_killed_supervisor_leaves_no_worker_behind(workers: Service) -> None:
    """The last test of this service."""
    pids = workers.workers().values()
    workers.process.kill()
    workers.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
