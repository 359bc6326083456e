"""Forecast of the time that training takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """How long the stages of training take."""

    step_seconds: Sequence[float]
    """Estimated time of one step, by stage."""
    steps: Sequence[int]
    """Number of steps, by stage."""

    @property
    def seconds(self) -> float:
        """Estimated time of the whole training."""
        return math.fsum(seconds * steps for seconds, steps in zip(self.step_seconds, self.steps, strict=True))

    def seconds_left(self, stage: int, step: int, measured: float) -> float:
        """Return the time until training ends.

        The stages ahead keep their estimated ratio to the present stage, whose steps are measured.

        Args:
            stage: index of the present stage.
            step: completed steps of this stage.
            measured: seconds of one step of this stage, as measured.
        """
        ratio = measured / max(self.step_seconds[stage], 1e-9)
        ahead = Forecast(self.step_seconds[stage + 1 :], self.steps[stage + 1 :])
        return measured * (self.steps[stage] - step) + ratio * ahead.seconds


def duration(seconds: float) -> str:
    """Return a duration in words, in seconds below two minutes, in minutes below two hours."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
