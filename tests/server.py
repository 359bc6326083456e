"""A service as an operator runs it: a process of its own on a free loopback port."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 60
EMBED = {"inputs": [{"word": "seven"}]}


def start(
    *arguments: str, output: int | IO[str] = subprocess.PIPE, under: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    """A process that starts a service. ``environment`` holds its settings; it ends at once when told to, unless they say more.

    Args:
        output: where stdout goes. Nobody reads a pipe that you do not read.
        under: a command that takes rights away and then becomes the service.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    return subprocess.Popen(
        [*under, sys.executable, "-m", "service", *arguments],
        cwd=environment.pop("cwd", ROOT),
        env={**kept, "PYTHONPATH": str(ROOT), "CONCORD_THREADS": "1", "CONCORD_DRAIN_DELAY_MS": "0", **environment},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )


class Service:
    """A running one. ``client`` speaks to it over connections of its own."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process = process
        self._log = log
        self.port: int = self._first_line()["port"]
        self.address = f"127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=f"http://{self.address}", timeout=20, trust_env=False)

    def lines(self) -> list[dict[str, Any]]:
        """What it logged so far."""
        self._log.seek(0)
        return [json.loads(line) for line in self._log if line.endswith("\n")]

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.client.get("/readyz").status_code == 200)

    def wait_for(self, condition: Any, seconds: float = START_SECONDS) -> None:
        """Raises AssertionError unless it comes true. A refused connection is not yet an answer."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if condition():
                    return
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            assert time.monotonic() < until, "this never came true"
            time.sleep(0.02)

    def embed(self, **options: Any) -> httpx.Response:
        return self.client.post("/embed", json={**EMBED, **options})

    def metric(self, line: str) -> float:
        """The value of one line of /metrics, 0 where it is not there."""
        found = [own for own in self.client.get("/metrics").text.splitlines() if own.startswith(f"{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def resident(self) -> int:
        """Bytes of memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def threads(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/task").iterdir())

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def allow_descriptors(self, count: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (count, count))

    def stop(self, signal_number: int) -> int:
        """Its exit status after this signal."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)

    def _first_line(self) -> dict[str, Any]:
        until = time.monotonic() + START_SECONDS
        while not (lines := self.lines()):
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            assert time.monotonic() < until, "the service did not say where it listens"
            time.sleep(0.02)
        return next(line for line in lines if "port" in line)


def wait_until_ready(client: httpx.Client) -> None:
    for _ in range(500):
        with contextlib.suppress(httpx.ConnectError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("it did not become ready")


@contextlib.contextmanager
def running(*arguments: str, under: Sequence[str] = (), **environment: str) -> Iterator[Service]:
    """A ready service, killed at the end."""
    with tempfile.TemporaryFile("a+") as log:
        process = start("--port", "0", *arguments, output=log, under=under, **environment)
        try:
            service = Service(process, log)
            with service.client:
                service.wait_until_ready()
                yield service
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def running_apart(**environment: str) -> Iterator[Service]:
    """A ready service on every core but the last, and whoever asks it on that one: neither takes the other's time."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:-1] or cores)
    try:
        with running(**environment) as service:
            os.sched_setaffinity(0, cores[-1:])
            yield service
    finally:
        os.sched_setaffinity(0, cores)
