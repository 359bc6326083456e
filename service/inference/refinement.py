"""The refinement of one row: its noise, the best posterior so far, and when to stop."""

from enum import IntEnum
from math import isfinite

import numpy as np
from jaxtyping import Float32

from concord.model.modality import MAX_MODALITIES
from concord.service.inference.jobs import Objective, RefinementLimits, RefinementResult, StopReason


class Stream(IntEnum):
    """Purposes of random numbers. The streams of one row are independent: using one never changes another."""

    REFINE = 0
    GENERATE = 1
    EMBED = 2


_TOKENS = 2**63
"""Keys from here on are those of ``token_noise``."""


def noise(seed: int, index: int, stream: Stream, count: int, latent: int) -> Float32[np.ndarray, "count latent"]:
    """Standard normal numbers of row ``index`` in a request with ``seed``; other rows of the batch have no influence."""
    key = np.array([seed % 2**64, index * len(Stream) + stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal((count, latent), dtype=np.float32)


def token_noise(seed: int, index: int, modality: int, count: int, length: int) -> Float32[np.ndarray, "count length"]:
    """Uniform numbers in [0, 1) for the tokens of ``count`` texts of one modality, as ``noise`` independent of other rows.

    Args:
        modality: its position in the bundle.
    """
    key = np.array([seed % 2**64, _TOKENS + index * MAX_MODALITIES + modality], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random((count, length), dtype=np.float32)


def antithetic(half: Float32[np.ndarray, "*batch half latent"], count: int) -> Float32[np.ndarray, "*batch count latent"]:
    """Pairs (eps, -eps, ...): their mean is exactly zero, which lowers the variance of the objective."""
    pairs = np.repeat(half, 2, axis=-2)
    pairs[..., 1::2, :] *= -1
    return pairs[..., :count, :]


class RefinementState:
    """One row under refinement.

    ``Runtime.step`` returns the objective of its input posterior together with the next posterior, so T steps take T + 1
    evaluations, and no update is returned that was not evaluated.

    Args:
        start: the aligned posterior, mean and log variance in one array.
        complete: every modality is present. The objective is then the multimodal ELBO. Otherwise only observed terms count.
        now: seconds, monotonic.
    """

    __slots__ = ("_best", "_complete", "_highest", "_limits", "_posterior", "_stopped", "_trace", "_until")

    def __init__(
        self, limits: RefinementLimits, start: Float32[np.ndarray, " parameters"], *, complete: bool, now: float
    ) -> None:
        self._posterior = self._best = start
        self._complete = complete
        self._limits = limits
        self._until = np.inf if limits.until is None else limits.until
        if limits.budget_ms is not None:
            self._until = min(self._until, now + limits.budget_ms / 1000)
        self._highest = -np.inf
        self._trace: list[float] = []
        self._stopped: StopReason | None = None

    def advance(self, objective: float, following: Float32[np.ndarray, " parameters"], *, finite: bool, now: float) -> bool:
        """Record the objective of the present posterior and move on to the next one.

        Args:
            following: the next posterior.
            finite: every number of it is finite.

        Returns:
            whether another evaluation is due.
        """
        if not isfinite(objective):
            self._stopped = "diverged"
            return False
        trace, limits = self._trace, self._limits
        trace.append(objective)
        if objective > self._highest:
            self._highest, self._best = objective, self._posterior
        if len(trace) > limits.steps:
            self._stopped = "steps"
        elif limits.tolerance is not None and len(trace) > 1 and objective - trace[-2] < limits.tolerance:
            self._stopped = "tolerance"
        elif now >= self._until:
            self._stopped = "budget"
        elif not finite:
            self._stopped = "diverged"
        self._posterior = following
        return self._stopped is None

    @property
    def best(self) -> Float32[np.ndarray, " parameters"]:
        """The posterior with the highest objective so far; the starting posterior if none was finite."""
        return self._best

    def result(self) -> RefinementResult:
        """The finished refinement.

        Raises:
            RuntimeError: ``advance`` has not returned False yet.
        """
        if self._stopped is None:
            raise RuntimeError("this refinement is not finished: advance() has not returned False yet")
        objective: Objective = "elbo" if self._complete else "observed"
        return RefinementResult(
            steps=max(0, len(self._trace) - 1),
            objective=objective,
            before=self._trace[0] if self._trace else 0.0,
            after=self._highest if self._trace else 0.0,
            stopped=self._stopped,
            trace=self._trace if self._limits.trace else None,
        )
