"""Servers in processes of their own: started on their core, seen whole, and gone afterwards."""

import socket
import sys
import time

import pytest

from tests.benchmarks.process import SERVER_CORE, NotStartedError, free_ports, require_free, running

SERVER = """
import http.server, os, subprocess, sys
if sys.argv[2] == "family":
    stray = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    subprocess.Popen([sys.executable, "-c", f"{stray}; held = bytearray(50_000_000); time.sleep(600)"])
print(sorted(os.sched_getaffinity(0)), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def start(port: int, kind: str = "alone") -> list[str]:
    return [sys.executable, "-c", SERVER, str(port), kind]


def test_a_family_is_counted_and_ended_even_where_it_ignores_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """BentoML's and LitServe's workers are such children."""
    monkeypatch.setattr("tests.benchmarks.process.STOP_SECONDS", 0.5)
    (port,) = free_ports(1)
    with running(start(port, "family"), {}, port, "/") as server:
        until = time.monotonic() + 20
        while len(server.family()) < 2 or server.resident_bytes() < 50_000_000:
            assert time.monotonic() < until
            time.sleep(0.05)
        family = server.family()
        assert server.cold_start > 0
        assert server.cpu_seconds() > 0
    assert not [pid for pid in family if _alive(pid)]
    require_free(port)


def test_what_does_not_start_says_why() -> None:
    (port,) = free_ports(1)
    with pytest.raises(NotStartedError, match="ZeroDivisionError"), running([sys.executable, "-c", "1/0"], {}, port, "/"):
        pass


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NotStartedError, match="is taken"), running(start(port), {}, port, "/"):
            pass


def test_ports_differ() -> None:
    assert len(set(free_ports(5))) == 5


def test_the_server_has_its_core() -> None:
    (port,) = free_ports(1)
    with running(start(port), {}, port, "/") as server:
        (pid,) = server.family()
        with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
            allowed = next(line for line in status if line.startswith("Cpus_allowed_list"))
    assert allowed.split()[1] == str(SERVER_CORE)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
