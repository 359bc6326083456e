"""A bundle that is being served: its runtime, its engine, and whether both are fit for requests."""

import asyncio
from collections.abc import Sequence

import structlog

from model import codec
from model.manifest import Manifest
from model.runtime import Runtime
from service.calls import Reader
from service.engine import Engine, EngineFailed, Outcome, QueueFull, Work
from service.errors import Problem
from service.exercise import exercise
from service.settings import Settings
from service.telemetry import Metrics

log = structlog.get_logger(__name__)

GRACE_SECONDS = 5.0
PENDING = "not run yet"


class Serving:
    """Opened by ``start``, closed by ``stop``, on one event loop.

    Args:
        runtime: the bundle, opened.
        metrics: observes the engine.
    """

    def __init__(self, runtime: Runtime, settings: Settings, metrics: Metrics) -> None:
        self.runtime = runtime
        self.settings = settings
        self.engine = Engine(
            runtime,
            max_queue_items=settings.max_queue_items,
            max_wait=settings.max_queue_ms / 1000,
            max_batch=settings.max_batch,
            max_failures=settings.circuit_failures,
            probe_seconds=settings.circuit_probe_ms / 1000,
            observer=metrics,
        )
        self.reader = Reader(
            runtime.modalities,
            codec.Limits(image_pixels=settings.max_pixels),
            max_items=settings.max_items,
            max_refine_steps=settings.max_refine_steps,
        )
        self._prepared = {"bundle": "ok", "warmed": PENDING, "golden": PENDING}
        self._fit = False  # all of these are ok

    @property
    def manifest(self) -> Manifest:
        return self.runtime.bundle.manifest

    @property
    def label(self) -> str:
        """name@version."""
        return f"{self.manifest.name}@{self.manifest.version}"

    async def start(self) -> None:
        """Start the inference thread, run every graph once at a few batch sizes, replay the golden examples.

        What fails here is named by ``checks`` and keeps the bundle from being ready; the process stays, so that a person can
        ask it what is wrong.
        """
        self.engine.start()
        for check, run in (("warmed", self._warm), ("golden", self.runtime.replay_golden)):
            try:
                await asyncio.to_thread(run)
                self._prepared[check] = "ok"
            except Exception as error:  # a graph raises whatever it likes
                self._prepared[check] = "failed: see the log"
                log.error("not ready", bundle=self.label, check=check, reason=str(error))
        self._fit = all(answer == "ok" for answer in self._prepared.values())

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """End the inference thread, which first finishes what it can in ``grace`` seconds."""
        await asyncio.to_thread(self.engine.stop, grace)

    def alive(self) -> str:
        """The inference thread's check: that it is there and beats. Never depends on load."""
        if not self.engine.running:
            return "the inference thread has ended"
        age = self.engine.heartbeat_age
        return "ok" if age <= self.settings.heartbeat_ms / 1000 else f"the inference thread was last heard {age:.0f} s ago"

    def checks(self) -> dict[str, str]:
        """Everything that readiness asks for, each "ok" or what is wrong."""
        return {**self._prepared, "inference": self.alive(), "circuit": self.engine.trouble or "ok"}

    def ready(self) -> bool:
        return all(answer == "ok" for answer in self.checks().values())

    def refusal(self, coming: int = 0) -> Problem | None:
        """503, where one more request would be refused, after so many that are being decoded."""
        if not self._fit:
            return Problem("not_ready", "the model is not ready: see /readyz", retry_after_ms=1000)
        objection = self.engine.refusal(coming)
        return None if objection is None else self._problem(objection)

    def admit(self) -> None:
        """Raises the refusal."""
        if (refusal := self.refusal()) is not None:
            raise refusal

    async def submit(self, works: Sequence[Work]) -> list[Outcome]:
        """Outcomes in the order of the works.

        Raises:
            Problem: 503, the queue is full, or the engine failed.
        """
        try:
            return await self.engine.submit(works)
        except (QueueFull, EngineFailed) as error:
            raise self._problem(error) from error

    def _problem(self, error: QueueFull | EngineFailed) -> Problem:
        if isinstance(error, QueueFull):
            return Problem("queue_full", str(error), retry_after_ms=error.retry_after_ms)
        return Problem("engine_failed", "inference failed: it may succeed later", retry_after_ms=self.settings.circuit_probe_ms)

    def _warm(self) -> None:
        """The first run of a graph at a batch size allocates its memory; no request should wait for that."""
        for rows in sorted({1, self.settings.max_batch}):
            exercise(self.runtime, rows)
