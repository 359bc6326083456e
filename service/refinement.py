"""The refinement of one row: its noise, the best posterior so far, and when to stop."""

from enum import IntEnum
from math import isfinite

import numpy as np
from jaxtyping import Float32

from service.work import Objective, Refine, Refinement, Stopped


class Stream(IntEnum):
    """Purposes of random numbers. Streams of one row are independent: asking for one never changes another."""

    REFINE = 0
    GENERATE = 1
    EMBED = 2


def noise(seed: int, index: int, stream: Stream, count: int, latent: int) -> Float32[np.ndarray, "count latent"]:
    """Standard normal numbers of row ``index`` in a request with ``seed``: the same whatever else runs."""
    key = np.array([seed % 2**64, index * len(Stream) + stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal((count, latent), dtype=np.float32)


def antithetic(half: Float32[np.ndarray, "half latent"], count: int) -> Float32[np.ndarray, "count latent"]:
    """Pairs (eps, -eps, ...): the mean of the sample is exact, which steadies the objective."""
    return np.stack([half, -half], axis=1).reshape(-1, half.shape[1])[:count]


class Ascent:
    """One row on its way up.

    ``Runtime.refine`` tells the objective of the posterior that came in together with the next posterior, so T steps take T + 1
    evaluations, and the last update is never kept unseen.

    Args:
        complete: every modality is present. The anchor is then the prior, and the objective the multimodal ELBO; otherwise the
            anchor is the start, and only observed terms count.
        noise: antithetic standard normals, fixed over the steps so that objectives can be compared.
        now: seconds, monotonic.
    """

    __slots__ = ("_best", "_highest", "_refine", "_stopped", "_trace", "_until", "anchor", "complete", "noise", "posterior")

    def __init__(
        self,
        refine: Refine,
        mean: Float32[np.ndarray, " latent"],
        log_var: Float32[np.ndarray, " latent"],
        *,
        complete: bool,
        noise: Float32[np.ndarray, "sample latent"],
        now: float,
    ) -> None:
        self.posterior = self._best = (mean, log_var)
        self.anchor = (np.zeros_like(mean), np.zeros_like(log_var)) if complete else self.posterior
        self.complete = complete
        self.noise = noise
        self._refine = refine
        self._until = np.inf if refine.until is None else refine.until
        if refine.budget_ms is not None:
            self._until = min(self._until, now + refine.budget_ms / 1000)
        self._highest = -np.inf
        self._trace: list[float] = []
        self._stopped: Stopped | None = None

    def advance(
        self,
        objective: float,
        mean: Float32[np.ndarray, " latent"],
        log_var: Float32[np.ndarray, " latent"],
        *,
        finite: bool,
        now: float,
    ) -> bool:
        """Take in the objective of ``posterior`` and move on to the next one.

        Args:
            finite: every number of the next posterior is finite.

        Returns:
            whether another evaluation is due.
        """
        if not isfinite(objective):
            self._stopped = "diverged"
            return False
        gain = objective - self._trace[-1] if self._trace else np.inf
        self._trace.append(objective)
        if objective > self._highest:
            self._highest, self._best = objective, self.posterior
        refine = self._refine
        if len(self._trace) > refine.steps:
            self._stopped = "steps"
        elif refine.tolerance is not None and gain < refine.tolerance:
            self._stopped = "tolerance"
        elif now >= self._until:
            self._stopped = "budget"
        elif not finite:
            self._stopped = "diverged"
        self.posterior = (mean, log_var)
        return self._stopped is None

    @property
    def best(self) -> tuple[Float32[np.ndarray, " latent"], Float32[np.ndarray, " latent"]]:
        """Mean and log-variance with the highest objective seen; the start where none was finite."""
        return self._best

    def refinement(self) -> Refinement:
        """What it came to; asked for once ``advance`` returned False."""
        if self._stopped is None:
            raise RuntimeError("this ascent is still under way: advance() has not returned False yet")
        objective: Objective = "elbo" if self.complete else "observed"
        return Refinement(
            steps=max(0, len(self._trace) - 1),
            objective=objective,
            before=self._trace[0] if self._trace else 0.0,
            after=self._highest if self._trace else 0.0,
            stopped=self._stopped,
            trace=self._trace if self._refine.trace else None,
        )
