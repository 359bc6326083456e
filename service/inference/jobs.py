"""Inference jobs and their results: one row each, or the reason why there is no result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import NDArray

from concord.model.codec import count_inputs

Objective = Literal["elbo", "observed"]
StopReason = Literal["steps", "tolerance", "budget", "diverged"]


@dataclass(frozen=True, slots=True)
class RefinementLimits:
    """How far to refine. The limit that is reached first ends the refinement."""

    steps: int = 0
    tolerance: float | None = None
    """Nats: stop after a step that gained less."""
    budget_ms: float | None = None
    """Milliseconds since refinement began."""
    until: float | None = None
    """Seconds on the monotonic clock: the budget also ends here."""
    trace: bool = False


@dataclass(frozen=True, slots=True)
class InferenceJob:
    """One row to embed, and what to generate from it. Every random number depends on ``seed`` and ``index`` alone."""

    row: Mapping[str, NDArray[Any]]
    """Arrays of the present modalities, as ``model.modality.check_array`` accepts them, or inputs of their frozen encoders; at
    least one."""
    seed: int
    index: int
    """Position in its request."""
    refine: RefinementLimits = RefinementLimits()
    sample_embedding: bool = False
    targets: tuple[str, ...] = ()
    num_samples: int = 1
    latent: Literal["sample", "mean"] = "sample"
    temperature: float = 1.0
    """Multiplies the standard deviation of the samples that targets are generated from, not of the sampled embedding."""
    text_temperature: float = 0.0
    """Of the tokens of texts with the autoregressive likelihood. 0 takes the most likely one."""
    top_p: float = 1.0
    """Share of the probability of a token that is sampled."""

    def runs(self, lengths: Mapping[str, int]) -> int:
        """Upper bound on how often this row passes through a graph.

        Args:
            lengths: largest number of tokens of each text that is generated token by token, by modality.
        """
        frozen = sum(map(count_inputs, self.row.values()))
        decoded = self.num_samples * sum(lengths.get(target, 1) for target in self.targets)
        return 1 + frozen + (self.refine.steps + 1 if self.refine.steps else 0) + decoded


@dataclass(frozen=True, slots=True)
class RefinementResult:
    """What refinement did to one row. Objectives are in weighted nats."""

    steps: int
    """Updates taken and evaluated."""
    objective: Objective
    before: float
    after: float
    """Of the posterior that is returned: never below ``before``. Both are 0 if the objective is not finite at the start."""
    stopped: StopReason
    trace: list[float] | None
    """The objective at the start and after each step: steps + 1 numbers, or none if it is not finite at the start."""


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """Result of one ``InferenceJob``. Every number in it is finite."""

    mean: Float32[np.ndarray, " latent"]
    log_var: Float32[np.ndarray, " latent"]
    sample: Float32[np.ndarray, " latent"] | None
    generated: dict[str, Shaped[np.ndarray, "sample ..."]]
    """By target, what ``Runtime.decode`` returns: (num_samples, ...)."""
    refinement: RefinementResult | None
    """None if no step was requested."""
    stage_seconds: dict[str, float]
    """Seconds this row spent in each of queue, features, encode, refine and generate."""


class QueueFull(Exception):  # noqa: N818 - a state of the queue, not a mistake
    """The request does not fit. None of its jobs was accepted.

    Attributes:
        waiting: jobs held.
        retry_after_ms: milliseconds until they are likely to be done, at the present pace.
    """

    def __init__(self, waiting: int, retry_after_ms: int) -> None:
        super().__init__(f"the queue holds {waiting} items, which take about {retry_after_ms} ms")
        self.waiting = waiting
        self.retry_after_ms = retry_after_ms


class EngineFailed(Exception):  # noqa: N818
    """A graph raised an error, or the thread that runs the graphs has ended. The cause is chained."""


class ModelNotReady(Exception):  # noqa: N818
    """The model has not passed its self-test."""


Rejection = QueueFull | EngineFailed | ModelNotReady
"""Why a model accepts no jobs now."""
