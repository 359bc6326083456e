"""A bundle that is being served: its runtime, its engine, and whether both are fit for requests."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import structlog

from concord.model.bundle.manifest import Manifest
from concord.model.gallery import Gallery
from concord.model.runtime import Runtime
from concord.service.inference.engine import Engine
from concord.service.inference.jobs import InferenceJob, InferenceResult, ModelNotReady, Rejection
from concord.service.inference.scheduler import Observer
from concord.service.settings import Settings

log = structlog.get_logger(__name__)

GRACE_SECONDS = 5.0
EXIT_SECONDS = 1.5
"""From the loss of the device to the end of the process: requests get their responses."""
EXIT_CODE = 70
"""Of a process whose device is lost."""
PENDING = "not run yet"


class ServedModel:
    """Opened by ``start``, closed by ``stop``, on one event loop.

    Args:
        runtime: the bundle, opened.
        observer: receives the engine's measurements.
        on_device_lost: called once no graph can run in this process any more. None: ``exit_soon``.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        observer: Observer,
        on_device_lost: Callable[[], None] | None = None,
    ) -> None:
        self.runtime = runtime
        self.engine = Engine(
            runtime,
            max_queue_items=settings.max_queue_items,
            max_wait=settings.max_queue_ms / 1000,
            max_batch=settings.max_batch,
            max_failures=settings.circuit_failures,
            probe_seconds=settings.circuit_probe_ms / 1000,
            observer=observer,
            on_device_lost=on_device_lost or exit_soon,
        )
        self._heartbeat_seconds = settings.heartbeat_ms / 1000
        self._prepared = {"bundle": "ok", "warmed": PENDING, "golden": PENDING}
        self._prepared_ok = False

    @property
    def manifest(self) -> Manifest:
        return self.runtime.bundle.manifest

    @property
    def galleries(self) -> Mapping[str, Gallery]:
        """Training examples by modality."""
        return self.runtime.galleries

    @property
    def label(self) -> str:
        """name@version."""
        return f"{self.manifest.name}@{self.manifest.version}"

    async def start(self) -> None:
        """Start the inference thread, and in it warm up every graph and replay the golden examples.

        A check that fails here is reported by ``checks`` and keeps the model from being ready. The process goes on, so that an
        operator can ask it what is wrong.
        """
        self.engine.start()
        for check, run in (("warmed", self.engine.warm_up), ("golden", self.runtime.replay_golden)):
            try:
                await self.engine.call(run)
                self._prepared[check] = "ok"
            except Exception as error:  # graphs raise errors of any class
                self._prepared[check] = "failed: see the log"
                log.error("not ready", bundle=self.label, check=check, reason=str(error))
        self._prepared_ok = all(result == "ok" for result in self._prepared.values())

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End the inference thread, which first finishes what it can in ``grace`` seconds."""
        await asyncio.to_thread(self.engine.stop, grace)

    def alive(self) -> str:
        """ "ok", or what is wrong with the inference thread's heartbeat. Never depends on load."""
        if not self.engine.running:
            return "the device is lost" if self.engine.device_lost else "the inference thread has ended"
        age = self.engine.heartbeat_age
        return "ok" if age <= self._heartbeat_seconds else f"the inference thread was last heard {age:.0f} s ago"

    def checks(self) -> dict[str, str]:
        """The readiness checks, each "ok" or what is wrong."""
        return {**self._prepared, "inference": self.alive(), "circuit": self.engine.failure or "ok"}

    def ready(self) -> bool:
        return all(result == "ok" for result in self.checks().values())

    def check_capacity(self, pending: int = 0) -> Rejection | None:
        """Why one more request would be rejected now; None if it would be accepted.

        Args:
            pending: requests that are being parsed.
        """
        return self.engine.check_capacity(pending) if self._prepared_ok else ModelNotReady("the model is not ready")

    async def run(self, jobs: Sequence[InferenceJob], *, alone: bool = False) -> list[InferenceResult]:
        """Results in the order of the jobs. This is the authoritative admission check.

        Args:
            alone: as ``Engine.submit``.

        Raises:
            QueueFull: not all of the jobs fit now; none was accepted.
            EngineFailed: a graph failed on one of them, or the engine does not run.
            ModelNotReady: a self-test failed.
        """
        if not self._prepared_ok:
            raise ModelNotReady("the model is not ready")
        return await self.engine.submit(jobs, alone=alone)


def exit_soon() -> None:
    """End the process with ``EXIT_CODE`` after ``EXIT_SECONDS``, without cleaning up: that of CUDA may never return."""

    def end() -> None:
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    threading.Timer(EXIT_SECONDS, end).start()
