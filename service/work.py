"""What goes into the engine and what comes out of it, one row each; or why nothing does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import NDArray

Objective = Literal["elbo", "observed"]
Stopped = Literal["steps", "tolerance", "budget", "diverged"]


@dataclass(frozen=True, slots=True)
class Refine:
    """How far to refine. What comes first ends it."""

    steps: int = 0
    tolerance: float | None = None
    """Nats: stop after a step that gained less."""
    budget_ms: float | None = None
    """Milliseconds since refinement began."""
    until: float | None = None
    """Seconds, monotonic: the budget is spent then too."""
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """One row to embed, and what to generate from it. Every random number depends on ``seed`` and ``index`` alone."""

    row: Mapping[str, NDArray[Any]]
    """Arrays of the present modalities, as ``model.modality.check_array`` accepts them; at least one."""
    seed: int
    index: int
    """Position in its request."""
    refine: Refine = Refine()
    sample_embedding: bool = False
    targets: tuple[str, ...] = ()
    num_samples: int = 1
    latent: Literal["sample", "mean"] = "sample"
    temperature: float = 1.0
    """Multiplies the standard deviation of what is generated from, not of the sampled embedding."""

    @property
    def runs(self) -> int:
        """Times this row goes through a graph, at most."""
        return 1 + (self.refine.steps + 1 if self.refine.steps else 0) + len(self.targets) * self.num_samples


@dataclass(frozen=True, slots=True)
class Refinement:
    """What refinement did to one row. Objectives are in weighted nats."""

    steps: int
    """Updates taken and evaluated."""
    objective: Objective
    before: float
    after: float
    """Of the posterior that is returned: never below ``before``. Both 0 where not even the start's objective is finite."""
    stopped: Stopped
    trace: list[float] | None
    """The objective at the start and after each step: steps + 1 numbers, fewer only where the start's is not finite."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answer to one ``Work``. Everything in it is finite."""

    mean: Float32[np.ndarray, " latent"]
    log_var: Float32[np.ndarray, " latent"]
    sample: Float32[np.ndarray, " latent"] | None
    generated: dict[str, Shaped[np.ndarray, "sample ..."]]
    """By target, what ``Runtime.decode`` returns: (num_samples, ...)."""
    refinement: Refinement | None
    """None when no step was asked for."""
    timings: dict[str, float]
    """Seconds this row spent in each of queue, encode, refine and generate."""


class QueueFull(Exception):  # noqa: N818 - a state, not a mistake
    """The request does not fit. None of its items was taken.

    Attributes:
        waiting: items held.
        retry_after_ms: milliseconds until they are likely to be done, at the present pace.
    """

    def __init__(self, waiting: int, retry_after_ms: int) -> None:
        super().__init__(f"the queue holds {waiting} items, which take about {retry_after_ms} ms")
        self.waiting = waiting
        self.retry_after_ms = retry_after_ms


class EngineFailed(Exception):  # noqa: N818
    """A graph raised, or the thread that runs them is gone. The cause is chained."""
