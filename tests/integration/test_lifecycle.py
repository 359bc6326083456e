"""How a service process starts and stops: signals under load and at start-up, invalid bundles, rights, and its output."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from concord.model import bundle
from tests.support.bundles import cut_short, write_copy
from tests.support.raw_http import connect, head, read_response
from tests.support.server import EMBED, Service, running, start, wait_until_ready
from tests.tools.load import sigterm_once

BODY = b'{"inputs": [{"word": "seven"}]}'
MAX_RESIDENT_BYTES = 210 << 20
"""Of a process that serves the built-in bundle: 187 MB on an AMD EPYC."""


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [1000, 600])
def test_sigterm_under_load_loses_no_request(delay_ms: int) -> None:
    """A load balancer polls /readyz five times within the delay. ``python -m tests.tools.load sigterm`` does this 20 times."""
    result = asyncio.run(sigterm_once(rate=40.0, seconds=1.0, delay_ms=delay_ms))
    assert set(result["outcomes"]) == {"200"}, result
    assert result["outcomes"]["200"] > 20
    assert result["status"] == 0


@pytest.mark.slow
def test_resident_memory_of_a_service_with_the_built_in_bundle_stays_small() -> None:
    """Heaps of the C library and arenas of ONNX Runtime once took 50 MB more."""
    with running(OMP_NUM_THREADS="1") as service:
        for steps in (0, 4):
            service.embed(refine={"steps": steps}).raise_for_status()
        assert service.resident_bytes() < MAX_RESIDENT_BYTES


@pytest.mark.slow
def test_sigterm_fails_readiness_serves_on_for_the_delay_and_finishes_requests_in_flight() -> None:
    delay_seconds = 2.0
    with running(CONCORD_DRAIN_DELAY_MS="2000") as service, contextlib.ExitStack() as stack:
        for _ in range(2):
            kept_alive = service.embed()
            assert kept_alive.headers.get("connection") != "close"
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/readyz").status_code == 503)
        checks = service.client.get("/readyz").json()["checks"]
        assert [name for name, result in checks.items() if result != "ok"] == ["accepting"]
        assert service.client.get("/livez").status_code == 200
        in_flight = stack.enter_context(connect(service.client))
        in_flight.sendall(head("/embed", len(BODY)) + BODY[:-1])
        served = 0
        with contextlib.suppress(httpx.TransportError):  # the listener is closed
            while True:
                with httpx.Client(base_url=service.client.base_url, trust_env=False) as client:
                    response = client.post("/embed", json=EMBED)
                assert (response.status_code, response.headers["connection"]) == (200, "close")
                served += 1
        assert served > 0
        assert time.monotonic() - began > delay_seconds
        in_flight.sendall(BODY[-1:])
        with in_flight.makefile("rb") as file:
            assert read_response(file)[0] == 200, "the request in flight was not finished"
        assert service.process.wait(timeout=60) == 0
        assert any(line["event"] == "stopping" for line in service.log_lines())


def test_stuck_request_gets_503_when_the_grace_is_spent() -> None:
    """The process ends before the deadline of the request, which is 20 seconds."""
    with running(CONCORD_GRACE_MS="1000") as service, socket.create_connection(("127.0.0.1", service.port)) as stuck:
        stuck.sendall(head("/embed", 9) + b"{")
        service.wait_for(lambda: service.metric("concord_requests_in_flight") == 2)  # the other one is the scrape
        began = time.monotonic()
        assert service.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 15
        with contextlib.suppress(ConnectionError):
            received = stuck.makefile("rb").read()
            assert received.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_service_during_its_drain_delay(second: signal.Signals) -> None:
    with running(CONCORD_DRAIN_DELAY_MS="60000") as service:
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/readyz").status_code == 503)
        began = time.monotonic()
        assert service.stop(second) == 1
        assert time.monotonic() - began < 30


def test_sigint_skips_the_drain_delay() -> None:
    with running(CONCORD_DRAIN_DELAY_MS="60000") as service:
        service.client.close()
        began = time.monotonic()
        assert service.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("after", [0.0, 0.6, 1.2])
def test_sigterm_during_start_up_ends_the_service(after: float) -> None:
    """The signal arrives ``after`` seconds: at different moments of the start."""
    process = start("--port", "0", CONCORD_DRAIN_DELAY_MS="500")
    time.sleep(after)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode in {0, -signal.SIGTERM}  # the kernel ends it until Python handles signals
    assert "Traceback" not in out + err


def test_service_starts_on_the_same_port_after_sigkill() -> None:
    with running() as service:
        port = service.port
        with contextlib.suppress(httpx.HTTPError):
            service.embed()
            service.process.kill()
            service.embed()
    with running("--port", str(port)) as service:
        assert service.embed().status_code == 200


@pytest.mark.parametrize(
    "case", ["missing", "empty", "a file", "truncated manifest", "truncated graph", "no manifest in any folder"]
)
def test_invalid_bundle_ends_with_a_message(tmp_path: Path, case: str) -> None:
    path = tmp_path / "served"
    variable = "CONCORD_BUNDLE"
    if case in {"empty", "no manifest in any folder"}:
        path.mkdir()
    if case == "a file":
        path.write_text("no folder")
    if case.startswith("truncated"):
        write_copy(path)
        cut_short(path, bundle.MANIFEST if case == "truncated manifest" else "encode.onnx")
    if case == "no manifest in any folder":
        variable = "CONCORD_BUNDLES"
    process = start("--port", "0", **{variable: str(path)})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(path) in err
    assert "Traceback" not in out + err


def test_unavailable_cuda_device_ends_with_a_message() -> None:
    process = start("--port", "0", CONCORD_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cuda" in err
    assert "Traceback" not in err


def test_service_writes_no_file_and_opens_no_connection(tmp_path: Path) -> None:
    """Its working folder is read-only, it has no temporary folder, and its home must stay empty."""
    read_only, home = tmp_path / "read-only", tmp_path / "home"
    read_only.mkdir(mode=0o500)
    home.mkdir()
    with running(cwd=str(read_only), HOME=str(home), TMPDIR="/nowhere", PYTHONDONTWRITEBYTECODE="1") as service:
        parts = {"word": (None, "seven"), "photo": ("p.png", bytes(3 << 20))}
        assert service.client.post("/embed", files=parts).status_code == 400
        assert service.embed(refine={"steps": 2}).status_code == 200
        assert files_open_for_writing(service) == []
        assert connection_count(service) <= 1, "one is that of the test"
    assert [*read_only.iterdir(), *home.rglob("*")] == []


def connection_count(service: Service) -> int:
    """Return the number of its TCP sockets without the listener."""
    process = Path(f"/proc/{service.process.pid}")
    inodes = {str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in (process / "net" / name).read_text().splitlines()[1:]]
    return sum(f"socket:[{row[9]}]" in inodes and row[3] != "0A" for row in rows)


def files_open_for_writing(service: Service) -> list[str]:
    """Return the files on disk that it has open for writing, without its log."""
    files = []
    for entry in Path(f"/proc/{service.process.pid}/fdinfo").iterdir():
        flags = int(entry.read_text().split("flags:")[1].split()[0], 8)
        target = Path(f"/proc/{service.process.pid}/fd/{entry.name}").readlink()
        if flags & 0o3 and str(target).startswith("/") and not str(target).startswith("/dev/") and int(entry.name) > 2:
            files.append(str(target))
    return files


UNPRIVILEGED = ("setpriv", "--no-new-privs", "--inh-caps=-all", *(("--bounding-set=-all",) if os.geteuid() == 0 else ()))
"""Starts a command as a container does: without capabilities, and without a way to gain them."""


@pytest.mark.slow
def test_service_runs_without_privileges() -> None:
    with running(prefix=UNPRIVILEGED) as service:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert service.embed(refine={"steps": 2}).status_code == 200
        with ThreadPoolExecutor(32) as pool:
            assert {response.status_code for response in pool.map(lambda _: service.embed(), range(200))} == {200}
        assert service.thread_count() <= 16, "the process limit of a container counts threads"
        assert service.stop(signal.SIGTERM) == 0


def test_unreadable_bundle_ends_with_a_message(tmp_path: Path) -> None:
    weights = write_copy(tmp_path / "served").path / bundle.WEIGHTS
    weights.chmod(0)
    process = start("--port", "0", "--bundle", str(tmp_path / "served"), prefix=UNPRIVILEGED)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"{weights}: cannot be read (Permission denied)" in err
    assert "Traceback" not in out + err


def test_log_on_a_full_disk_fails_no_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Path("/dev/full").open("w") as full:
        process = start("--port", str(port), output=full, CONCORD_LOG_LEVEL="debug")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until_ready(client)
            assert {client.post("/embed", json=EMBED).status_code for _ in range(50)} == {200}
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_closed_output_pipes_fail_no_request() -> None:
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
                assert client.get("/nowhere").status_code == 404, "each of these is logged"
            assert client.post("/embed", json=EMBED).status_code == 200
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
