"""The supervisor of ``concord serve --workers``: it starts, watches, reloads and stops the workers, and serves no request.

It binds the sockets and passes them on. All workers accept from one queue of connections, so a worker that ends takes none with
it that it had not accepted.
"""

import asyncio
import contextlib
import math
import signal
import socket
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from concord.model.bundle import BundleError
from concord.service.http.acceptor import ConnectionCounts
from concord.service.inference.reload import BundleWatcher
from concord.service.settings import Settings
from concord.service.workers.channel import Channel, ChannelError, Handler, frame
from concord.service.workers.merged_metrics import Family, MergedMetrics, families

FAILED = 1
MAX_FAILED_STARTS = 3
"""Failed starts in a row, while no worker is ready, after which the supervisor gives up."""
STABLE_SECONDS = 10.0
"""A worker that was ready for this long is started again at once when it ends."""
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
HEARTBEAT_SECONDS = 1.0
MAX_MISSED_HEARTBEATS = 3
"""Failed liveness checks in a row after which a worker is killed."""
START_SECONDS = 120.0
"""Longest start of a worker, and longest check of a new bundle by a worker. One that takes longer hangs."""
COLLECT_SECONDS = 1.0
"""Longest wait for the readiness or the metrics of a worker."""

log = structlog.get_logger("concord.service")


@dataclass(eq=False)
class Worker:
    """One process."""

    number: int
    process: asyncio.subprocess.Process
    channel: Channel
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    families: Sequence[Family] = ()
    """Its metrics, as collected last."""
    missed_heartbeats: int = 0


class Supervisor:
    """Runs once, on one event loop.

    Args:
        settings: of the service.
        worker_settings: of each worker.
        count: number of workers.
        listener: bound, not listening. The supervisor never listens on it.
        operators: the same for the operators' port.
        shared: descriptors of the memory that the workers share, by name.
        counts: connections of each worker.
    """

    def __init__(
        self,
        settings: Settings,
        worker_settings: Settings,
        count: int,
        listener: socket.socket,
        operators: socket.socket | None,
        shared: dict[str, int],
        counts: ConnectionCounts,
    ) -> None:
        self._settings = settings
        self._count = count
        self._required = math.ceil(settings.ready_share * count)
        self._descriptors = {
            "listener": listener.fileno(),
            "operators": None if operators is None else operators.fileno(),
            **shared,
        }
        self._sockets = [one for one in (listener, operators) if one is not None]
        self._greeting = {"settings": worker_settings.model_dump(mode="json"), **self._descriptors}
        self._counts = counts
        self._workers: set[Worker] = set()
        self._one_at_a_time = asyncio.Lock()  # starts of workers, and reloads
        self._stopping = asyncio.Event()
        self._first_ready = asyncio.Event()
        self._failed_starts = 0
        self._status = 0
        self._watcher = BundleWatcher(
            lambda: settings.bundle_folders() if settings.bundles else [], self._replace, settings.watch_seconds
        )
        self._merged = MergedMetrics()
        self._collecting = asyncio.Lock()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._ready = Gauge("concord_ready", "1 if every readiness check passes, else 0.", registry=self._registry)
        self._restarts = Counter(
            "concord_worker_restarts", "Worker processes that ended and were started again.", registry=self._registry
        )

    async def run(self) -> int:
        """Run until a signal, or until all workers have failed. Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._watcher.reload)
        with contextlib.suppress(BundleError):  # the first worker ends with its message
            self._watcher.note(self._settings.bundle_folders())
        keepers = [asyncio.create_task(self._keep(1))]
        await _first_of(self._first_ready.wait(), keepers[0])
        if self._first_ready.is_set():
            keepers += [asyncio.create_task(self._keep(number)) for number in range(2, self._count + 1)]
            self._watcher.start()
            heartbeats = asyncio.create_task(self._check_heartbeats())
            await asyncio.gather(*keepers)
            heartbeats.cancel()
            await asyncio.gather(self._watcher.stop(), heartbeats, return_exceptions=True)
        return self._status

    async def _keep(self, number: int) -> None:
        """Keep one worker running, until the service stops."""
        failures = 0
        while not self._stopping.is_set():
            status, ready_seconds = await self._run_worker(number)
            if self._stopping.is_set():
                if status not in (0, -signal.SIGTERM, -signal.SIGINT):
                    self._status = self._status or FAILED
                return
            log.error("worker ended", worker=number, status=status, ready_seconds=round(ready_seconds, 1))
            self._failed_starts += not ready_seconds
            none_ready = not any(worker.ready.is_set() for worker in self._workers)
            if none_ready and self._failed_starts >= (MAX_FAILED_STARTS if self._first_ready.is_set() else 1):
                log.critical("all workers failed")
                self._status = status if status > 0 else FAILED
                self._stop(signal.SIGTERM)
                return
            failures = 1 if ready_seconds >= STABLE_SECONDS else failures + 1
            self._restarts.inc()
            await _first_of(self._stopping.wait(), asyncio.sleep(backoff_seconds(failures)))

    async def _run_worker(self, number: int) -> tuple[int, float]:
        """Start a worker and wait until it ends. Returns its exit status, and the seconds that it was ready."""
        async with self._one_at_a_time:
            if self._stopping.is_set():
                return 0, 0.0
            try:
                worker = await self._start(number)
            except OSError as error:  # too many processes, or too little memory
                log.error("worker not started", worker=number, reason=str(error))
                return FAILED, 0.0
            await _first_of(worker.ready.wait(), worker.process.wait(), asyncio.sleep(START_SECONDS))
            if not worker.ready.is_set() and worker.process.returncode is None:
                log.critical("worker killed", worker=number, reason=f"it is not ready after {START_SECONDS:g} s")
                _send(worker, signal.SIGKILL)
        since = monotonic()
        status = await worker.process.wait()
        self._workers.discard(worker)
        self._counts.set(number - 1, None)
        self._merged.retire(worker.families)
        await worker.channel.close()
        return status, monotonic() - since if worker.ready.is_set() else 0.0

    async def _start(self, number: int) -> Worker:
        own, end = socket.socketpair()
        with contextlib.ExitStack() as opened, end:
            opened.enter_context(own)
            descriptors = [one for one in (end.fileno(), *self._descriptors.values()) if one is not None]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "concord.service.worker", str(end.fileno())),
                pass_fds=descriptors,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone, which passes it on
            )
            opened.pop_all()  # from here on ``own`` is the channel's
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which the next lines notice
            own.sendall(frame({"number": number, **self._greeting}))
        handlers: dict[str, Handler] = {"liveness": self._liveness, "readiness": self._readiness, "metrics": self._metrics}
        worker = Worker(number, process, await Channel.open(own, {**handlers, "ready": lambda: self._on_ready(worker)}))
        self._workers.add(worker)
        if self._stopping.is_set():
            _send(worker, signal.SIGTERM)
        return worker

    async def _on_ready(self, worker: Worker) -> None:
        worker.ready.set()
        self._failed_starts = 0
        self._first_ready.set()
        log.info("worker ready", worker=worker.number, pid=worker.process.pid, of=self._count)

    def _stop(self, number: int) -> None:
        """Pass the signal on. A second one ends the workers at once, and so this process."""
        if self._stopping.is_set():
            self._status = self._status or FAILED
        self._stopping.set()
        for one in self._sockets:
            one.close()  # so that connections are refused once the last worker has closed its copy
        for worker in self._workers:
            _send(worker, number)

    async def _check_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await asyncio.gather(*(self._check_heartbeat(worker) for worker in self._ready_workers()))

    async def _check_heartbeat(self, worker: Worker) -> None:
        """Kill a worker that hangs. A worker that is stopping has its own time limits."""
        try:
            checks = await worker.channel.call("liveness", seconds=self._settings.heartbeat_ms / 1000)
        except ChannelError:  # it ends
            return
        except TimeoutError:
            checks, worker.missed_heartbeats = {"event loop": "it does not respond"}, MAX_MISSED_HEARTBEATS
        alive = all(result == "ok" for result in checks.values())
        worker.missed_heartbeats = 0 if alive else worker.missed_heartbeats + 1
        if worker.missed_heartbeats >= MAX_MISSED_HEARTBEATS and not self._stopping.is_set():
            log.critical("worker killed", worker=worker.number, checks=checks)
            _send(worker, signal.SIGKILL)

    async def _liveness(self) -> dict[str, str]:
        """Of this process, as the result shows: it restarts workers that hang."""
        return {"supervisor": "ok"}

    async def _readiness(self) -> dict[str, str]:
        """``ready_share`` of the workers must be ready; else the failing checks of each are listed too."""
        accepting = {"accepting": "the server is stopping" if self._stopping.is_set() else "ok"}
        workers = self._ready_workers()
        checks = await asyncio.gather(*(_call(worker, "readiness") for worker in workers))
        failing = [{name: result for name, result in (one or NO_RESPONSE).items() if result != "ok"} for one in checks]
        ready = sum(not one for one in failing)
        if ready >= self._required:
            return {**accepting, "workers": "ok"}
        return {
            **accepting,
            "workers": f"{ready} of {self._count} are ready, and {self._required} must be",
            **{
                f"worker {worker.number}/{name}": result
                for worker, one in zip(workers, failing, strict=True)
                for name, result in one.items()
            },
        }

    async def _metrics(self) -> str:
        async with self._collecting:
            await asyncio.gather(*(self._collect(worker) for worker in self._ready_workers()))
            self._ready.set(all(result == "ok" for result in (await self._readiness()).values()))
            # Ended workers are in neither sum nor set between two lines without await.
            return self._merged.expose(families(self._registry), [worker.families for worker in self._workers]).decode()

    async def _collect(self, worker: Worker) -> None:
        """A worker that does not respond keeps the metrics collected before."""
        worker.families = await _call(worker, "families") or worker.families

    async def _replace(self, folder: Path) -> None:
        """Replace the bundle of a folder in all workers or in none: each opens and checks it, and only then all switch over."""
        async with self._one_at_a_time:
            workers = self._ready_workers()
            reasons = await asyncio.gather(*(self._prepare(worker, folder) for worker in workers))
            reason = next((reason for reason in reasons if reason is not None), None)
            call = ("commit", str(folder)) if reason is None else ("abort", str(folder), reason)
            await asyncio.gather(*(worker.channel.call(*call) for worker in workers), return_exceptions=True)
        if reason is not None:
            log.error("bundle not loaded: the current one is served on", folder=folder.name, reason=reason)

    async def _prepare(self, worker: Worker, folder: Path) -> str | None:
        try:
            reason: str | None = await worker.channel.call("prepare", str(folder), seconds=START_SECONDS)
        except TimeoutError:
            return f"worker {worker.number} has not checked it after {START_SECONDS:g} s"
        except ChannelError as error:  # a worker that ends opens what the folder holds when it starts again
            return None if worker.channel.closed.done() else str(error)
        return reason

    def _ready_workers(self) -> list[Worker]:
        return sorted((worker for worker in self._workers if worker.ready.is_set()), key=lambda worker: worker.number)


NO_RESPONSE = {"event loop": "it does not respond"}


def backoff_seconds(failures: int) -> float:
    """Wait before the next start after so many ends in a row: none, then from ``MIN_BACKOFF_SECONDS`` on twice as long each."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF_SECONDS, MIN_BACKOFF_SECONDS * 2.0 ** (failures - 2))


async def _call(worker: Worker, name: str) -> Any:
    """The result; None if there is none in time."""
    try:
        return await worker.channel.call(name, seconds=COLLECT_SECONDS)
    except (ChannelError, TimeoutError):
        return None


def _send(worker: Worker, number: int) -> None:
    if worker.process.returncode is None:
        worker.process.send_signal(number)


async def _first_of(*awaitables: Awaitable[Any]) -> None:
    """Wait for one of them. Coroutines that are not done are cancelled; tasks are not."""
    tasks = [one if isinstance(one, asyncio.Task) else asyncio.ensure_future(one) for one in awaitables]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for one, task in zip(awaitables, tasks, strict=True):
        if one is not task:
            task.cancel()
