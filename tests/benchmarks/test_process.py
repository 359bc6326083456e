"""Servers in separate processes: start on their core, measurement of all processes, and stop."""

import socket
import sys
import time

import pytest

from tests.benchmarks.process import SERVER_CORE, NotStartedError, free_ports, require_free, running

SERVER = """
import http.server, os, subprocess, sys
if sys.argv[2] == "worker":
    worker = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    subprocess.Popen([sys.executable, "-c", f"{worker}; memory = bytearray(50_000_000); time.sleep(600)"])
print(sorted(os.sched_getaffinity(0)), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def server_command(port: int, kind: str = "single") -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), kind]


def test_running_with_a_worker_that_ignores_sigterm_counts_and_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is in a session that differs from its parent's, like the workers of BentoML and LitServe."""
    monkeypatch.setattr("tests.benchmarks.process.STOP_SECONDS", 0.5)
    (port,) = free_ports(1)
    with running(server_command(port, "worker"), {}, port, "/") as server:
        until = time.monotonic() + 20
        while len(server.process_ids()) < 2 or server.resident_bytes() < 50_000_000:
            assert time.monotonic() < until
            time.sleep(0.05)
        pids = server.process_ids()
        assert server.cold_start_seconds > 0
        assert server.cpu_seconds() > 0
    assert not [pid for pid in pids if _is_running(pid)]
    require_free(port)


def test_running_with_a_failing_command_raises_with_its_output() -> None:
    (port,) = free_ports(1)
    with pytest.raises(NotStartedError, match="ZeroDivisionError"), running([sys.executable, "-c", "1/0"], {}, port, "/"):
        pass


def test_running_on_a_port_in_use_raises_before_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(NotStartedError, match="is in use"), running(server_command(port), {}, port, "/"):
            pass


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(5))) == 5


def test_running_pins_the_server_to_its_core() -> None:
    (port,) = free_ports(1)
    with running(server_command(port), {}, port, "/") as server:
        (pid,) = server.process_ids()
        with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
            allowed = next(line for line in status if line.startswith("Cpus_allowed_list"))
    assert allowed.split()[1] == str(SERVER_CORE)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
