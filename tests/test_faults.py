"""What goes wrong around a service while it runs: files that change under it, clients that leave, descriptors that run out."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model import bundle
from tests.copies import cut_short
from tests.load import left, overloaded
from tests.server import EMBED, Service, running, start, wait_until_ready
from tests.traffic import mixed

GENERATE = {"inputs": [{"word": "seven"}], "latent": "mean", "output": {"image": "raw"}, "refine": {"steps": 2}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "removed"])
def test_what_happens_to_its_files_does_not_reach_a_running_service(tmp_path: Path, damage: str) -> None:
    """Weights that are mapped into memory would end it with SIGBUS, or change its answers."""
    place = tmp_path / "served"
    shutil.copytree(bundle.builtin(bundle.DEFAULT_BUNDLE), place)
    with running("--bundle", str(place), CONCORD_WATCH_SECONDS="0.1") as service:
        expected = service.client.post("/cross-generate", json=GENERATE).json()
        if damage == "cut short":
            for file in place.iterdir():
                cut_short(place, file.name, 10)
        elif damage == "overwritten":
            with (place / bundle.WEIGHTS).open("r+b") as weights:
                weights.write(os.urandom(weights.seek(0, os.SEEK_END)))
                weights.seek(0)
                weights.write(os.urandom(1 << 20))
        else:
            shutil.rmtree(place)
        service.wait_for(lambda: service.client.get("/v1/models/digits").json()["state"] == "failed", 20)
        assert service.client.get("/readyz").status_code == 200
        answer = service.client.post("/cross-generate", json=GENERATE).json()
        for name, (value,) in answer["data"][0]["generated"].items():
            (before,) = expected["data"][0]["generated"][name]
            assert value == before, name
        samples = service.client.get("/page/samples/digits")
        assert samples.status_code == (200 if damage == "overwritten" else 503), "the page reads other files than the weights"
        assert service.metric(f'concord_bundle_state{{name="digits",state="failed",version="{answer["model_version"]}"}}') == 1


def test_clients_that_leave_leave_nothing(service: Service) -> None:
    """At every stage; ``python -m tests.load leave`` does this 10,000 times."""
    told = asyncio.run(left(service, count=600))
    assert told["left"] == 600
    assert told["counted_or_answered"] >= 0.9 * told["left"]  # some leave before their request is read
    assert told["in_flight"] == 1, "the scrape itself"
    assert told["queue_depth"] == 0
    assert told["descriptors"][1] <= told["descriptors"][0] + 2
    assert told["threads"][1] <= told["threads"][0]
    assert told["resident_mb"][1] - told["resident_mb"][0] < 30
    assert service.embed().status_code == 200


def test_descriptors_that_run_out_come_back() -> None:
    with running() as service:
        service.allow_descriptors(64)
        assert service.embed().status_code == 200
        crowd = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                crowd.append(socket.create_connection(("127.0.0.1", service.port), timeout=2))
        assert service.embed().status_code == 200, "who was connected goes on"
        assert service.client.get("/livez").status_code == 200
        for connection in crowd:
            connection.close()

        def anew() -> bool:
            with httpx.Client(base_url=service.client.base_url, trust_env=False) as fresh, contextlib.suppress(httpx.HTTPError):
                return fresh.post("/embed", json=EMBED).status_code == 200
            return False

        service.wait_for(anew, 10)
        assert service.process.poll() is None


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    process = start("--port", "0", output=subprocess.PIPE)
    assert process.stdout is not None
    port = json.loads(process.stdout.readline())["port"]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=5) as client:
            wait_until_ready(client)
            for _ in range(600):  # far more than a pipe holds
                assert client.get("/nowhere", headers={"X-Request-Id": "x" * 128}).status_code == 404
            assert client.post("/embed", json=EMBED).status_code == 200
    finally:
        process.kill()
        process.communicate()


def test_more_than_it_can_do_is_refused_at_once_and_over_when_it_is_over() -> None:
    """``python -m tests.load overload`` does this for minutes."""
    with running(CONCORD_MAX_QUEUE_ITEMS="64") as service:
        told = asyncio.run(overloaded(service, mixed(steps=16), times=(10,), seconds=3.0))
        burst = told["10x"]
        assert set(burst["outcomes"]) == {"200", "503"}, told
        assert burst["accepted_ms"]["p99"] < 4000 * 64 / told["peak_per_second"] + 1000, "64 items wait at most"
        assert burst["rejected_ms"]["p50"] < burst["accepted_ms"]["p50"] / 2
        assert burst["retry_after_ms"][1] > 50, "the wait is foreseen"
        assert burst["recovered_after_s"] < 5
        assert burst["resident_mb"] - told["resident_mb"] < 64
        assert service.client.get("/readyz").status_code == 200
