"""Faults around a running service: files that change, clients that disconnect, descriptors that run out, overload."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from concord.model import bundle
from tests.benchmarks.process import free_ports
from tests.support.bundles import cut_short
from tests.support.server import EMBED, ROOT, Service, running, start, wait_until_ready
from tests.support.traffic import mixed_requests
from tests.tools.load import measure_disconnects, measure_overload

GENERATE = {"inputs": [{"word": "seven"}], "latent": "mean", "output": {"image": "raw"}, "refine": {"steps": 2}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "removed"])
def test_damaged_bundle_files_do_not_affect_a_running_service(tmp_path: Path, damage: str) -> None:
    """If the weights were memory-mapped, the service would end with SIGBUS, or return other results."""
    folder = tmp_path / "served"
    shutil.copytree(bundle.builtin(bundle.DEFAULT_BUNDLE), folder)
    with running("--bundle", str(folder), CONCORD_WATCH_SECONDS="0.1") as service:
        expected = service.client.post("/cross-generate", json=GENERATE).json()
        if damage == "cut short":
            for file in folder.iterdir():
                cut_short(folder, file.name, 10)
        elif damage == "overwritten":
            with (folder / bundle.WEIGHTS).open("r+b") as weights:
                weights.write(os.urandom(weights.seek(0, os.SEEK_END)))
                weights.seek(0)
                weights.write(os.urandom(1 << 20))
        else:
            shutil.rmtree(folder)
        service.wait_for(lambda: service.client.get("/v1/models/digits").json()["state"] == "failed")
        assert service.client.get("/readyz").status_code == 200
        body = service.client.post("/cross-generate", json=GENERATE).json()
        for name, (value,) in body["data"][0]["generated"].items():
            (expected_value,) = expected["data"][0]["generated"][name]
            assert value == expected_value, name
        demo_data = service.client.get("/page/samples/digits")
        assert demo_data.status_code == (200 if damage == "overwritten" else 503), "the page does not read the weights"
        assert service.metric("concord_bundle_state", name="digits", state="failed", version=body["model_version"]) == 1


def test_disconnecting_clients_leave_no_resources_behind(service: Service) -> None:
    """At every stage of a request; ``python -m tests.tools.load disconnect`` does this 10,000 times."""
    result = asyncio.run(measure_disconnects(service, count=600))
    assert result["disconnected"] == 600
    assert result["counted"] >= 0.9 * result["disconnected"]  # some disconnect before their request is read
    assert result["in_flight"] == 1, "the scrape itself"
    assert result["queue_depth"] == 0
    assert result["descriptors"][1] <= result["descriptors"][0] + 2
    assert result["threads"][1] <= result["threads"][0]
    assert result["resident_mb"][1] - result["resident_mb"][0] < 30
    assert service.embed().status_code == 200


def test_service_recovers_when_descriptors_have_run_out() -> None:
    with running() as service:
        service.limit_descriptors(64)
        assert service.embed().status_code == 200
        connections = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                connections.append(socket.create_connection(("127.0.0.1", service.port), timeout=2))
        assert service.embed().status_code == 200, "an open connection stopped working"
        assert service.client.get("/livez").status_code == 200
        for connection in connections:
            connection.close()

        def new_connection_works() -> bool:
            with (
                httpx.Client(base_url=service.client.base_url, trust_env=False) as client,
                contextlib.suppress(httpx.HTTPError),
            ):
                return client.post("/embed", json=EMBED).status_code == 200
            return False

        service.wait_for(new_connection_works)
        assert service.process.poll() is None


def test_log_pipe_that_is_not_read_blocks_no_request() -> None:
    process = start("--port", "0", output=subprocess.PIPE)
    assert process.stdout is not None
    port = json.loads(process.stdout.readline())["port"]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            wait_until_ready(client)
            for _ in range(600):  # far more log lines than a pipe holds
                assert client.get("/nowhere", headers={"X-Request-Id": "x" * 128}).status_code == 404
            assert client.post("/embed", json=EMBED).status_code == 200
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_overload_is_rejected_quickly_and_ends_with_the_load() -> None:
    """``python -m tests.tools.load overload`` does this for minutes."""
    queue_items = 64
    with running(CONCORD_MAX_QUEUE_ITEMS=str(queue_items)) as service:
        result = asyncio.run(measure_overload(service, mixed_requests(steps=16), multiples=(10,), seconds=3.0))
        burst = result["10x"]
        assert set(burst["outcomes"]) == {"200", "503"}, result
        full_queue_ms = 1000 * queue_items / result["peak_per_second"]
        assert burst["accepted_ms"]["p99"] < 10 * full_queue_ms + 1000, "an accepted request waited for more than the queue"
        assert burst["rejected_ms"]["p50"] < burst["accepted_ms"]["p50"] / 2
        assert burst["retry_after_ms"][1] > 50, "the expected wait is the minimum"
        assert burst["recovered_after_s"] < 10 * full_queue_ms / 1000 + 5
        assert burst["resident_mb"] - result["resident_mb"] < 64
        assert service.client.get("/readyz").status_code == 200


LOSE_DEVICE = """
import pathlib
from concord.model.runtime import Runtime

encode, order, lost = Runtime.encode, pathlib.Path({file!r}), []


def encode_or_fail(self, *arguments):
    if order.exists():
        order.unlink()
        lost.append(True)  # for the rest of this process
    if lost:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x")
    return encode(self, *arguments)


Runtime.encode = encode_or_fail
"""
RESTART_ONCE = '"$@"; status=$?; echo $status > {file}; [ $status -eq 70 ] && exec "$@"'


def test_process_with_a_lost_device_responds_and_ends_and_its_supervisor_starts_it_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LOSE_DEVICE.format(file=str(tmp_path / "lose")))
    (port,) = free_ports(1)
    supervisor = ["sh", "-c", RESTART_ONCE.format(file=tmp_path / "status"), "sh"]
    with (
        running("--port", str(port), prefix=supervisor, PYTHONPATH=f"{tmp_path}:{ROOT}") as service,
        ThreadPoolExecutor(8) as pool,
    ):
        assert service.embed().status_code == 200
        (tmp_path / "lose").touch()
        responses = [pool.submit(service.embed) for _ in range(8)]
        assert {response.result().status_code for response in responses} == {503}, "a request hung"
        assert service.client.get("/livez").status_code == 503
        status = tmp_path / "status"
        service.wait_for(lambda: status.exists() and status.read_text() == "70\n")
        service.wait_until_ready()
        assert service.embed().status_code == 200
        assert [line["event"] for line in service.log_lines()].count("device lost") == 1


@pytest.mark.slow
def test_worker_with_a_lost_device_ends_and_is_replaced_while_the_others_serve(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LOSE_DEVICE.format(file=str(tmp_path / "lose")))
    with (
        running("--workers", "2", PYTHONPATH=f"{tmp_path}:{ROOT}") as service,
        ThreadPoolExecutor(8) as pool,
    ):
        before = service.wait_for_workers(2)
        (tmp_path / "lose").touch()
        statuses = [response.result().status_code for response in [pool.submit(service.embed) for _ in range(64)]]
        assert set(statuses) <= {200, 503}, "a request hung or lost its response"
        assert 503 in statuses
        ended = [line for line in service.log_lines() if line["event"] == "device lost"]
        assert len(ended) == 1, "the other worker's device is lost too"
        service.wait_for(lambda: service.workers() != before, message="the worker was not replaced")
        (line,) = (line for line in service.log_lines() if line["event"] == "worker ended")
        assert line["status"] == 70
        assert [service.embed().status_code for _ in range(8)] == [200] * 8
