"""A bundle that is being served: its runtime, its engine, and whether both are fit for requests."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np
import structlog

from model import codec
from model.bundle import BundleError, Manifest
from model.runtime import Posterior, Runtime
from service.calls import Reader
from service.engine import Engine
from service.errors import Problem
from service.settings import Settings
from service.telemetry import Metrics

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 5.0
"""An inference thread that is silent for longer is taken for dead. Many times one run of a graph."""
GRACE_SECONDS = 5.0
PENDING = "not run yet"

P = ParamSpec("P")
R = TypeVar("R")


class Serving:
    """Opened by ``start``, closed by ``stop``, on one event loop.

    Args:
        runtime: the bundle, opened.
        metrics: observes the engine.
    """

    def __init__(self, runtime: Runtime, settings: Settings, metrics: Metrics) -> None:
        self.runtime = runtime
        self.settings = settings
        self.metrics = metrics
        self.engine = Engine(runtime, max_queue_items=settings.max_queue_items, max_batch=settings.max_batch, observer=metrics)
        self.reader = Reader(
            runtime.modalities,
            codec.Limits(image_pixels=settings.max_pixels),
            max_items=settings.max_items,
            max_refine_steps=settings.max_refine_steps,
        )
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._prepared = {"bundle": "ok", "warmed": PENDING, "golden": PENDING}

    @property
    def manifest(self) -> Manifest:
        return self.runtime.bundle.manifest

    async def start(self) -> None:
        """Start the inference thread, run every graph once at a few batch sizes, replay the golden examples.

        What fails here is named by ``checks`` and keeps the service from being ready; the process stays, so that a person can
        ask it what is wrong.
        """
        self.engine.start()
        for check, run in (("warmed", self._warm), ("golden", self.runtime.replay_golden)):
            try:
                await self.in_thread(run)
                self._prepared[check] = "ok"
            except BundleError as error:
                self._prepared[check] = "failed: see the log"
                log.error("not ready", check=check, reason=str(error))

    async def stop(self) -> None:
        """End the inference thread, which first finishes what it can in ``GRACE_SECONDS``."""
        await asyncio.to_thread(self.engine.stop, GRACE_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what would hold up the event loop in one of the few decode threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *args, **kwargs))

    def alive(self) -> str:
        """The inference thread's check."""
        age = self.engine.heartbeat_age
        return "ok" if age <= HEARTBEAT_SECONDS else f"the inference thread was last heard {age:.0f} s ago"

    def checks(self) -> dict[str, str]:
        """Everything that readiness asks for, each "ok" or what is wrong."""
        return {**self._prepared, "inference": self.alive()}

    def ready(self) -> bool:
        return all(answer == "ok" for answer in self.checks().values())

    def require_name(self, model: str) -> None:
        """Raises Problem, 404, unless this is the bundle's name, or name@version."""
        names = (self.manifest.name, f"{self.manifest.name}@{self.manifest.version}")
        if model not in names:
            raise Problem("unknown_model", f"no model of this name is served: there is {' or '.join(names)}")

    def require_ready(self) -> None:
        """Raises Problem, 503, while a check fails."""
        if not self.ready():
            raise Problem("not_ready", "the service is not ready: see /readyz", retry_after_ms=1000)

    def _warm(self) -> None:
        """The first run of a graph at a batch size allocates its memory; no request should wait for that."""
        for rows in sorted({1, self.settings.max_batch}):
            inputs = {m.name: np.zeros((rows, *m.shape), dtype=m.dtype) for m in self.runtime.modalities}
            present = np.ones((rows, len(self.runtime.modalities)), dtype=bool)
            posterior = self.runtime.encode(inputs, present)
            noise = np.zeros((rows, self.runtime.samples, self.runtime.latent), dtype=np.float32)
            anchor = Posterior(np.zeros_like(posterior.mean), np.zeros_like(posterior.log_var))
            self.runtime.refine(inputs, present, posterior, anchor, noise)
            for modality in self.runtime.modalities:
                self.runtime.decode(modality.name, posterior.mean)
