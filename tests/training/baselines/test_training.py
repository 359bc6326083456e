"""Baselines in the training loop: resumable with the same numbers, evaluated, and not exportable."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from concord.training import fit
from concord.training.checkpoint import Position, Run
from concord.training.cli import app
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.progress import Progress

STAGES = {"mvae": ["joint"], "jnf": ["joint", "flows"]}


class CrashError(Exception):
    pass


class CrashingRun(Run):
    """A run that crashes after the checkpoint at ``crash_position``."""

    crash_position: Position

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        super().save(position, state)
        if position == self.crash_position:
            raise CrashError


@pytest.mark.parametrize("model", STAGES)
def test_baseline_after_a_crash_in_any_stage_ends_with_the_same_numbers(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(fit, "LOG_STEPS", 2)
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 2)
    stage = {"epochs": 1, "batch_size": 20}
    settings: Config = make_config(model=model, joint=stage, refiner={**stage, "steps": 1}, align={**stage, "epochs": 2})
    rows = dataset.load(settings, "train")
    uninterrupted = Run(tmp_path / "uninterrupted", settings)
    expected = fit.fit(settings, rows, uninterrupted, Progress()).state_dict()
    for index in range(len(STAGES[model])):
        crashing = CrashingRun(tmp_path / "interrupted", settings)
        crashing.crash_position = Position(index, 2)
        with pytest.raises(CrashError):
            fit.fit(settings, rows, crashing, Progress())
    assert fit.load(settings, rows.modalities, crashing) is None
    weights = fit.fit(settings, rows, Run(tmp_path / "interrupted", settings), Progress()).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert list(dict.fromkeys(line["stage"] for line in uninterrupted.metrics())) == STAGES[model]
    assert uninterrupted.metrics()[-1]["stage_index"] == len(STAGES[model]) - 1
    assert sum(1 for line in uninterrupted.metrics() if line["step"] == 2) == len(STAGES[model])


def test_baselines_have_as_many_epochs_as_concord(make_config: Any) -> None:
    sizes = {name: {"epochs": epochs} for name, epochs in (("joint", 1), ("refiner", 2), ("align", 4))}
    epochs = {}
    for model in STAGES:
        settings: Config = make_config(model=model, **sizes)
        stages = fit.build(settings, dataset.load(settings, "train").modalities).stages(settings)
        epochs[model] = [stage.settings.epochs for stage in stages]
    assert epochs == {"mvae": [7], "jnf": [3, 4]}


def test_baseline_is_fitted_and_evaluated_but_not_exported(write_config: Any, tmp_path: Path) -> None:
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(tmp_path / "c.toml", model="mopoe", joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = [str(config), "--out", str(tmp_path / "run")]
    fitted = CliRunner().invoke(app, ["fit", *options])
    assert fitted.exit_code == 0, fitted.output
    assert "linear probe" in fitted.stdout
    rejected = CliRunner().invoke(app, ["export", *options])
    assert rejected.exit_code == 2
    assert 'model is "mopoe"; only model = "concord" can be exported' in rejected.stderr


def test_sha256_depends_on_the_model(make_config: Any) -> None:
    assert make_config(model="concord").sha256 == make_config().sha256 != make_config(model="mvae").sha256
