"""The service as an operator runs it: a separate process on a free loopback port."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx

from tests.support import metrics
from tests.support.waiting import SECONDS, wait_for

ROOT = Path(__file__).parent.parent.parent
EMBED = {"inputs": [{"word": "seven"}]}
"""Body of a request that every service with the built-in bundle can process."""

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
"""Type of the fixture ``serve`` in tests/service, which runs a server inside the test process."""


def start(
    *arguments: str, output: int | IO[str] = subprocess.PIPE, prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start a service process.

    Args:
        arguments: of ``concord serve``.
        output: where stdout goes. A pipe fills up unless the test reads it.
        prefix: a command that drops rights and then becomes the service.
        environment: settings. By default the service stops without a delay.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "concord.service", "serve", *arguments],
        cwd=environment.pop("cwd", ROOT),
        env={**inherited, "PYTHONPATH": str(ROOT), "CONCORD_THREADS": "1", "CONCORD_DRAIN_DELAY_MS": "0", **environment},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )


class Service:
    """A running service process.

    Attributes:
        address: host:port.
        client: an HTTP client of the service.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process = process
        self._log = log
        self.wait_for(self.log_lines, message="the service did not log its port")
        self.port: int = next(line["port"] for line in self.log_lines() if "port" in line)
        self.address = f"127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=f"http://{self.address}", timeout=60, trust_env=False)

    def log_lines(self) -> list[dict[str, Any]]:
        """Return what the service has logged so far."""
        own = Path(f"/proc/self/fd/{self._log.fileno()}")  # the service's writes would move the position of the shared file
        return [json.loads(line) for line in own.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def workers(self) -> dict[int, int]:
        """Return the process id of each worker that has become ready, by its number."""
        return {line["worker"]: line["pid"] for line in self.log_lines() if line["event"] == "worker ready"}

    def wait_for_workers(self, count: int) -> dict[int, int]:
        """Wait until so many workers have become ready, and return their process ids."""
        self.wait_for(lambda: len(self.workers()) == count, message=f"{count} workers did not become ready")
        return self.workers()

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: is_ready(self.client), message="the service did not become ready")

    def wait_for(
        self, condition: Callable[[], Any], seconds: float = SECONDS, message: str = "the condition did not become true"
    ) -> None:
        """Wait until ``condition`` holds. A refused connection counts as false.

        Raises:
            AssertionError: the condition is still false after ``seconds``, or the process has ended.
        """

        def holds() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                if condition():
                    return True
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            return False

        wait_for(holds, seconds, message)

    def embed(self, **options: Any) -> httpx.Response:
        """Send a small request."""
        return self.client.post("/embed", json={**EMBED, **options})

    def metric(self, name: str, /, **labels: str) -> float:
        """Return a value of /metrics: the sum of the samples with these labels."""
        return metrics.scrape(self.client, name, **labels)

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def thread_count(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/task").iterdir())

    def descriptor_count(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def cpu_seconds(self) -> float:
        """Return the processor time used so far. It hardly depends on what else the machine does."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def body_cpu_seconds(self) -> float:
        """Return the processor time of a harmless body of 31 MB, as a control for hostile ones."""
        content = json.dumps(EMBED).encode().ljust(31 << 20)
        costs = []
        for _ in range(3):
            before = self.cpu_seconds()
            self.client.post("/embed", content=content, headers={"content-type": "application/json"}).raise_for_status()
            costs.append(self.cpu_seconds() - before)
        return max(costs)

    def limit_descriptors(self, count: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (count, count))

    def stop(self, signal_number: int) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=SECONDS)


def is_ready(client: httpx.Client) -> bool:
    return client.get("/readyz").status_code == 200


def wait_until_ready(client: httpx.Client) -> None:
    """Wait for a service that was started without ``running``."""

    def ready() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return is_ready(client)
        return False

    wait_for(ready, message="the service did not become ready")


@contextlib.contextmanager
def running(*arguments: str, prefix: Sequence[str] = (), **environment: str) -> Iterator[Service]:
    """Run a service in this context: ready at the start, killed at the end."""
    with tempfile.TemporaryFile("a+") as log:
        process = start("--port", "0", *arguments, output=log, prefix=prefix, **environment)
        try:
            service = Service(process, log)
            with service.client:
                service.wait_until_ready()
                yield service
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def running_on_other_cores(**environment: str) -> Iterator[Service]:
    """Run a service on every core but the last, and this process on the last: neither takes time from the other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:-1] or cores)
    try:
        with running(**environment) as service:
            os.sched_setaffinity(0, cores[-1:])
            yield service
    finally:
        os.sched_setaffinity(0, cores)
