"""Rejections as HTTP problems, and the cheap admission check at the head of a request."""

from concord.service.api.parse_pool import ParsePool
from concord.service.errors import Problem
from concord.service.inference.engine import MIN_RETRY_MS
from concord.service.inference.jobs import ModelNotReady, QueueFull, Rejection
from concord.service.inference.registry import ModelRegistry
from concord.service.settings import Settings


def problem_from(rejection: Rejection, settings: Settings) -> Problem:
    """503, with the time after which a retry may succeed."""
    if isinstance(rejection, QueueFull):
        return Problem("queue_full", str(rejection), retry_after_ms=rejection.retry_after_ms)
    if isinstance(rejection, ModelNotReady):
        return Problem("not_ready", "the model is not ready: see /readyz", retry_after_ms=1000)
    return Problem("engine_failed", "inference failed: a retry may succeed", retry_after_ms=settings.circuit_probe_ms)


class CapacityCheck:
    """Whether one more request is likely to be accepted. ``ServedModel.run`` decides; this saves reading its body."""

    def __init__(self, registry: ModelRegistry, pool: ParsePool, settings: Settings) -> None:
        self._registry = registry
        self._pool = pool
        self._settings = settings

    def __call__(self, entering: int = 0) -> Problem | None:
        """503 if every model would reject it now, or too many requests wait to be parsed.

        Args:
            entering: requests that were accepted in this iteration of the event loop and are counted nowhere else yet.
        """
        if self._pool.pending >= self._settings.max_queue_items:
            wait_ms = max(MIN_RETRY_MS, int(1000 * self._pool.wait_seconds))
            return Problem("queue_full", f"{self._pool.pending} requests wait to be parsed", retry_after_ms=wait_ms)
        rejection = self._registry.check_capacity(self._pool.pending + entering)
        return None if rejection is None else problem_from(rejection, self._settings)
