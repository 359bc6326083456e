"""The forecast of the training time, and the estimate that it starts from."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from concord.training import estimate as module
from concord.training.checkpoint import Run
from concord.training.data import dataset
from concord.training.estimate import estimate
from concord.training.fit import fit
from concord.training.forecast import Forecast, duration
from concord.training.progress import Progress
from concord.training.stages import AlignStage, JointStage, RefinerStage


def test_forecast_is_the_sum_over_the_stages() -> None:
    assert Forecast([0.5, 2.0], [100, 10]).seconds == pytest.approx(70)
    assert Forecast([], []).seconds == 0


def test_time_left_scales_the_stages_ahead_with_the_measured_speed() -> None:
    forecast = Forecast([0.5, 2.0], [100, 10])
    assert forecast.seconds_left(0, 0, 0.5) == pytest.approx(70)
    assert forecast.seconds_left(0, 50, 1.0) == pytest.approx(50 + 40)
    assert forecast.seconds_left(1, 4, 3.0) == pytest.approx(18)
    assert forecast.seconds_left(1, 10, 3.0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (61.4, "61 s"), (119.9, "120 s"), (120, "2 min"), (7100, "118 min"), (7200, "2 h 0 min"), (9e3, "2 h 30 min")],
)
def test_duration_has_the_unit_that_suits_it(seconds: float, text: str) -> None:
    assert duration(float(seconds)) == text


class Clock:
    """A clock that passes of a model move: by a constant time and a time for each row."""

    def __init__(self, patch: pytest.MonkeyPatch, **speeds: tuple[float, float]) -> None:
        self.now = 0.0
        patch.setattr(time, "perf_counter", lambda: self.now)
        for stage in (JointStage, RefinerStage, AlignStage):
            self._slow_down(patch, stage, *speeds.get(stage.name, (0.0, 0.0)))

    def _slow_down(self, patch: pytest.MonkeyPatch, stage: Any, constant: float, per_row: float) -> None:
        original = stage.__call__

        def slow_call(stage: Any, batch: Any, noise: Any) -> Any:
            self.now += constant + per_row * len(batch)
            return original(stage, batch, noise)

        patch.setattr(stage, "__call__", slow_call)


@pytest.mark.parametrize("limit", [0.01, 3.0, 1000.0])
@pytest.mark.parametrize("accumulate", [1, 5])
def test_estimate_is_the_time_of_whole_batches_from_steps_within_the_limit(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, accumulate: int
) -> None:
    stage = {"epochs": 2, "batch_size": 60, "accumulate": accumulate}
    settings = make_config(joint=stage, refiner={**stage, "steps": 0}, align={**stage, "batch_size": 30})
    data = dataset.load(settings, "train")
    clock = Clock(monkeypatch, joint=(0.2, 0.01), refiner=(0.0, 0.05), align=(0.5, 0.0))
    forecast = estimate(settings, data, limit)
    assert clock.now < limit + 3 * (0.2 + 0.5) + (4 + 4 + 8) * 0.06, "three passes of each stage are free"
    estimated, clock.now = forecast.seconds, 0.0
    fit(settings, data, Run(tmp_path, settings), Progress(quiet=True))
    assert forecast.steps == [2, 2, 4]
    assert estimated == pytest.approx(clock.now)


@pytest.mark.parametrize("model", ["concord", "mvae", "jnf", "jmvae"])
def test_estimate_covers_the_stages_of_every_model_and_keeps_random_numbers(make_config: Any, model: str) -> None:
    settings = make_config(model=model, refresh={"epochs": 1, "batch_size": 20}, flow={"epochs": 1, "batch_size": 20})
    data = dataset.load(settings, "train")
    state = torch.get_rng_state()
    forecast = estimate(settings, data, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(forecast.step_seconds) == len(forecast.steps) == len(module.build(settings, data.modalities).stages(settings))
    assert all(seconds > 0 for seconds in forecast.step_seconds)
