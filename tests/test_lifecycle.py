"""How a service begins and ends: signals under load, at the start, and twice."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model import bundle
from tests.copies import cut_short, write_copy
from tests.load import sigterm_once
from tests.server import EMBED, Service, running, start, wait_until_ready

LONG = {"inputs": [{"word": "seven"}] * 8, "refine": {"steps": 24}}


@pytest.mark.parametrize("delay_ms", [1000, 300])
def test_sigterm_under_load_loses_nothing(delay_ms: int) -> None:
    """A balancer asks /readyz five times within the delay; ``python -m tests.load sigterm`` does this 20 times."""
    told = asyncio.run(sigterm_once(rate=40.0, seconds=1.0, delay_ms=delay_ms))
    assert set(told["outcomes"]) == {"200"}, told
    assert told["outcomes"]["200"] > 20
    assert told["status"] == 0


def test_first_not_ready_then_serving_on_then_the_end_of_what_is_in_flight() -> None:
    with running(CONCORD_DRAIN_DELAY_MS="1500") as service:
        for _ in range(2):  # a connection that is kept
            kept = service.embed()
            assert kept.headers.get("connection") != "close"
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/readyz").status_code == 503, 1)
        checks = service.client.get("/readyz").json()["checks"]
        assert [name for name, answer in checks.items() if answer != "ok"] == ["accepting"]
        assert service.client.get("/livez").status_code == 200
        while time.monotonic() - began < 1.2:
            with httpx.Client(base_url=service.client.base_url, trust_env=False) as fresh:
                answer = fresh.post("/embed", json=EMBED)
                assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        answers: list[httpx.Response] = []
        late = threading.Thread(target=lambda: answers.append(service.client.post("/embed", json=LONG)))
        late.start()
        assert service.process.wait(timeout=20) == 0
        late.join()
        assert answers[0].status_code == 200, "what was in flight was finished"
        assert time.monotonic() - began > 1.5
        assert any(line["event"] == "stopping" for line in service.lines())


def test_the_end_comes_when_grace_is_spent() -> None:
    with running(CONCORD_GRACE_MS="1000") as service, socket.create_connection(("127.0.0.1", service.port)) as stuck:
        stuck.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        time.sleep(0.2)
        began = time.monotonic()
        assert service.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5
        with contextlib.suppress(ConnectionError):
            received = stuck.makefile("rb").read()
            assert received.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_on_the_spot(second: signal.Signals) -> None:
    with running(CONCORD_DRAIN_DELAY_MS="60000") as service:
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/readyz").status_code == 503, 2)
        began = time.monotonic()
        assert service.stop(second) == 1
        assert time.monotonic() - began < 1


def test_sigint_does_not_wait_for_balancers() -> None:
    with running(CONCORD_DRAIN_DELAY_MS="60000") as service:
        service.client.close()
        began = time.monotonic()
        assert service.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("after", [0.0, 0.6, 1.2])
def test_sigterm_while_it_starts_ends_it(after: float) -> None:
    process = start("--port", "0", CONCORD_DRAIN_DELAY_MS="5000")
    time.sleep(after)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode in {0, -signal.SIGTERM}  # before Python hears of signals, the kernel's way
    assert "Traceback" not in out + err


def test_after_sigkill_it_starts_again_on_the_same_port() -> None:
    with running() as service:
        port = service.port
        with contextlib.suppress(httpx.HTTPError):
            service.embed()
            service.process.kill()
            service.embed()
    with running_at(port) as again:
        assert again.embed().status_code == 200


@contextlib.contextmanager
def running_at(port: int):
    with running("--port", str(port)) as service:
        yield service


@pytest.mark.parametrize("case", ["missing", "empty", "a file", "cut short", "lying", "no manifest in any folder"])
def test_a_bundle_that_is_none_ends_in_a_message(tmp_path: Path, case: str) -> None:
    place = tmp_path / "served"
    variable = "CONCORD_BUNDLE"
    if case in {"empty", "no manifest in any folder"}:
        place.mkdir()
    if case == "a file":
        place.write_text("no folder")
    if case in {"cut short", "lying"}:
        write_copy(place)
        cut_short(place, bundle.MANIFEST if case == "cut short" else "encode.onnx")
    if case == "no manifest in any folder":
        variable = "CONCORD_BUNDLES"
    process = start("--port", "0", **{variable: str(place)})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(place) in err
    assert "Traceback" not in out + err


def test_cuda_that_is_not_there_is_refused() -> None:
    process = start("--port", "0", CONCORD_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "CUDA" in err
    assert "Traceback" not in err


def test_it_writes_no_file_and_calls_nobody(tmp_path: Path) -> None:
    """A read-only folder to work in, no temporary folder, a home that stays empty; and no connection of its own making."""
    nowhere, home = tmp_path / "read-only", tmp_path / "home"
    nowhere.mkdir(mode=0o500)
    home.mkdir()
    with running(cwd=str(nowhere), HOME=str(home), TMPDIR="/nowhere", PYTHONDONTWRITEBYTECODE="1") as service:
        parts = {"word": (None, "seven"), "photo": ("p.png", bytes(3 << 20))}
        assert service.client.post("/embed", files=parts).status_code == 400
        assert service.embed(refine={"steps": 2}).status_code == 200
        assert written(service) == []
        assert connections(service) <= 1, "the test's own"
    assert [*nowhere.iterdir(), *home.rglob("*")] == []


def connections(service: Service) -> int:
    """TCP sockets that it holds and that are no listener."""
    process = Path(f"/proc/{service.process.pid}")
    inodes = {str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in (process / "net" / name).read_text().splitlines()[1:]]
    return sum(f"socket:[{row[9]}]" in inodes and row[3] != "0A" for row in rows)


def written(service: Service) -> list[str]:
    """Files on a disk that it holds open for writing, but for its log."""
    found = []
    for entry in Path(f"/proc/{service.process.pid}/fdinfo").iterdir():
        flags = int(entry.read_text().split("flags:")[1].split()[0], 8)
        target = Path(f"/proc/{service.process.pid}/fd/{entry.name}").readlink()
        if flags & 0o3 and str(target).startswith("/") and not str(target).startswith("/dev/") and int(entry.name) > 2:
            found.append(str(target))
    return found


UNPRIVILEGED = ("setpriv", "--no-new-privs", "--inh-caps=-all", *(("--bounding-set=-all",) if os.geteuid() == 0 else ()))
"""As a container starts it: no capabilities, and none to gain."""


def test_it_needs_no_right_that_a_container_takes_away() -> None:
    with running(under=UNPRIVILEGED) as service:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert service.embed(refine={"steps": 2}).status_code == 200
        with ThreadPoolExecutor(32) as pool:
            assert {answer.status_code for answer in pool.map(lambda _: service.embed(), range(200))} == {200}
        assert service.threads() <= 16, "a limit on processes counts threads"
        assert service.stop(signal.SIGTERM) == 0


def test_a_bundle_that_may_not_be_read_ends_in_a_message(tmp_path: Path) -> None:
    weights = write_copy(tmp_path / "served").path / bundle.WEIGHTS
    weights.chmod(0)
    process = start("--port", "0", "--bundle", str(tmp_path / "served"), under=UNPRIVILEGED)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{weights}: cannot be read (Permission denied)" in err
    assert "Traceback" not in out + err


def test_a_log_on_a_full_disk_fails_no_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Path("/dev/full").open("w") as full:
        process = start("--port", str(port), output=full, CONCORD_LOG_LEVEL="debug")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until_ready(client)
            assert {client.post("/embed", json=EMBED).status_code for _ in range(50)} == {200}
        process.terminate()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def test_who_reads_its_output_may_go() -> None:
    process = start("--port", "0", output=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    try:
        port = line.partition('"port": ')[2].partition(",")[0]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until_ready(client)
            for _ in range(50):
                assert client.get("/nowhere").status_code == 404, "which is logged"
            assert client.post("/embed", json=EMBED).status_code == 200
        process.terminate()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
