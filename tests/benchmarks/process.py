"""A server in processes of its own, all on one core: started, looked at from outside, and stopped whatever it does."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.server import ROOT

START_SECONDS = 60
STOP_SECONDS = 10
SERVER_CORE, GENERATOR_CORE = 0, 1
_TICK = os.sysconf("SC_CLK_TCK")


class NotStartedError(RuntimeError):
    """A server that does not come up. The message ends with what it wrote."""


class Process:
    """A server's processes: the first one and what it started, wherever that put itself.

    Attributes:
        cold_start: seconds from its start to its first readiness.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, ready: str, log: IO[bytes]) -> None:
        self.port = port
        self._first = process
        self._known = {process.pid}
        began = time.monotonic()
        while not _answers(port, ready):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                log.seek(0)
                raise NotStartedError(f"{process.args!r} is not ready: {log.read()[-2000:].decode(errors='replace')}")
            time.sleep(0.005)
        self.cold_start = time.monotonic() - began

    def family(self) -> list[int]:
        """Process ids. Some put themselves into sessions of their own, so parents count, and who was seen before."""
        parents, groups = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = _stat(int(entry.name))
                    parents[int(entry.name)], groups[int(entry.name)] = int(fields[1]), int(fields[2])
        family = {pid for pid, group in groups.items() if group == self._first.pid} | (self._known & groups.keys())
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        self._known |= family
        return sorted(family)

    def cpu_seconds(self) -> float:
        """User and system time so far, of all of them."""
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in self.family()) / _TICK

    def resident_bytes(self) -> int:
        """Memory of all of them: what is private to each, and once what they share."""
        private, shared = 0, 0
        for pid in self.family():
            sizes: dict[str, int] = {}
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, size = line.partition(":")
                sizes[name] = 1024 * int(size.split()[0])
            private += sizes["Private_Clean"] + sizes["Private_Dirty"]
            shared = max(shared, sizes["Shared_Clean"] + sizes["Shared_Dirty"])
        return private + shared

    def stop(self) -> None:
        """SIGTERM to the process group, then SIGKILL to whoever is left."""
        family = self.family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._first.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(map(_lives, family)):
            self._first.poll()
            time.sleep(0.02)
        for pid in family:
            if _lives(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._first.wait()
        while any(map(_lives, family)):
            time.sleep(0.005)


@contextlib.contextmanager
def running(command: Sequence[str | Path], environment: Mapping[str, str], port: int, ready: str) -> Iterator[Process]:
    """A ready server on the server's core; its port is free again at the end.

    Args:
        ready: path that answers 200 once it is.

    Raises:
        NotStartedError: it does not come up, or the port is taken.
    """
    require_free(port)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    log_path = ROOT / ".venv-bench" / "server.log"
    log_path.parent.mkdir(exist_ok=True)
    with log_path.open("w+b") as log:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(SERVER_CORE), *map(str, command)],
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        server = None
        try:
            server = Process(process, port, ready, log)
            yield server
        finally:
            if server is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            else:
                server.stop()
    require_free(port)


def require_free(port: int) -> None:
    """Raises NotStartedError where something listens: the figures would be its."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise NotStartedError(f"port {port} is taken: stop what listens there") from error


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False
