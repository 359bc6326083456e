"""A server in separate processes, all on one core: start, measurement from outside, and a stop that ends every process."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.support.server import ROOT

START_SECONDS = 60
STOP_SECONDS = 10
SERVER_CORE, GENERATOR_CORE = 0, 1
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class NotStartedError(RuntimeError):
    """A server does not become ready. The message ends with its output."""


class Process:
    """The processes of a server: the first one and all its descendants.

    Attributes:
        cold_start_seconds: from the start of the process to the first successful readiness probe.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, ready_path: str, log: IO[bytes]) -> None:
        self.port = port
        self._root = process
        self._known = {process.pid}
        began = time.monotonic()
        while not _is_ready(port, ready_path):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                log.seek(0)
                raise NotStartedError(f"{process.args!r} is not ready: {log.read()[-2000:].decode(errors='replace')}")
            time.sleep(0.005)
        self.cold_start_seconds = time.monotonic() - began

    def process_ids(self) -> list[int]:
        """Return the ids of the first process and its descendants.

        Some workers start a new session, so the process group alone misses them. Orphans are known from earlier calls.
        """
        parents, groups = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = _stat(int(entry.name))
                    parents[int(entry.name)], groups[int(entry.name)] = int(fields[1]), int(fields[2])
        found = {pid for pid, group in groups.items() if group == self._root.pid} | (self._known & groups.keys())
        while children := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= children
        self._known |= found
        return sorted(found)

    def main_process_id(self) -> int:
        """Return the id of the first process: taskset becomes the server."""
        return self._root.pid

    def cpu_seconds(self) -> float:
        """Return the user and system time of all processes so far."""
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in self.process_ids()) / _TICKS_PER_SECOND

    def resident_bytes(self) -> int:
        """Return the resident memory: the private memory of all processes, plus the largest shared memory of any of them."""
        private, shared = 0, 0
        for pid in self.process_ids():
            sizes: dict[str, int] = {}
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, size = line.partition(":")
                sizes[name] = 1024 * int(size.split()[0])
            private += sizes["Private_Clean"] + sizes["Private_Dirty"]
            shared = max(shared, sizes["Shared_Clean"] + sizes["Shared_Dirty"])
        return private + shared

    def stop(self) -> None:
        """Send SIGTERM to the process group, then SIGKILL to the processes that are still running."""
        pids = self.process_ids()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._root.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(map(_is_running, pids)):
            self._root.poll()
            time.sleep(0.02)
        for pid in pids:
            if _is_running(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._root.wait()
        while any(map(_is_running, pids)):
            time.sleep(0.005)


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    port: int,
    ready_path: str,
    cores: Sequence[int] = (SERVER_CORE,),
) -> Iterator[Process]:
    """Run a server on the server's core. It is ready at the start; its port is free again at the end.

    Args:
        command: program and arguments.
        environment: variables, added to those of this process. Variables CONCORD_* of this process are removed.
        port: that the server listens on.
        ready_path: of the route that returns status 200 when the server is ready.
        cores: that it may use.

    Raises:
        NotStartedError: the server does not become ready, or the port is in use.
    """
    require_free(port)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    with tempfile.TemporaryFile() as log:  # a named one would be shared by tests that run at the same time
        process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), *map(str, command)],
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        server = None
        try:
            server = Process(process, port, ready_path, log)
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
    """Check that no process listens on the port. Otherwise the figures could be those of another server.

    Raises:
        NotStartedError: the port is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise NotStartedError(f"port {port} is in use: stop the process that listens on it") from error


def free_ports(count: int) -> list[int]:
    """Return different ports that are not in use."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


def _is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on. The process name before it can contain any character."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_running(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False
