"""Rivals in the training loop: resumed to the same numbers, evaluated, and never exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from training import data, fit
from training.__main__ import app
from training.baselines import stages
from training.checkpoint import Position, Run
from training.config import Config
from training.progress import Progress

STAGES = {"mvae": ["joint"], "jnf": ["joint", "flows"]}


class CrashError(Exception):
    pass


class Fragile(Run):
    """Crashes right after a checkpoint."""

    at: Position

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        super().save(position, state)
        if position == self.at:
            raise CrashError


@pytest.mark.parametrize("model", STAGES)
def test_a_rival_stopped_in_any_stage_ends_with_the_same_numbers(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(fit, "LOG_STEPS", 2)
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 2)
    stage = {"epochs": 1, "batch_size": 20}
    settings: Config = make_config(model=model, joint=stage, refiner={**stage, "steps": 1}, align={**stage, "epochs": 2})
    rows = data.load(settings, "train")
    straight = Run(tmp_path / "straight", settings)
    expected = fit.fit(settings, rows, straight, Progress()).state_dict()
    for index in range(len(STAGES[model])):
        fragile = Fragile(tmp_path / "stopped", settings)
        fragile.at = Position(index, 2)
        with pytest.raises(CrashError):
            fit.fit(settings, rows, fragile, Progress())
    assert fit.load(settings, rows, fragile) is None
    found = fit.fit(settings, rows, Run(tmp_path / "stopped", settings), Progress()).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert list(dict.fromkeys(line["stage"] for line in straight.metrics())) == STAGES[model]
    assert straight.metrics()[-1]["stage_index"] == len(STAGES[model]) - 1
    assert sum(1 for line in straight.metrics() if line["step"] == 2) == len(STAGES[model])


def test_every_rival_has_as_many_epochs_as_ours(make_config: Any) -> None:
    sizes = {name: {"epochs": epochs} for name, epochs in (("joint", 1), ("refiner", 2), ("align", 4))}
    epochs = {}
    for model in STAGES:
        settings: Config = make_config(model=model, **sizes)
        epochs[model] = [one.settings.epochs for one in stages(fit.build(settings, data.load(settings, "train")), settings)]
    assert epochs == {"mvae": [7], "jnf": [3, 4]}


def test_a_rival_is_fitted_and_evaluated_and_not_exported(write_config: Any, tmp_path: Path) -> None:
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(tmp_path / "c.toml", model="mopoe", joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = [str(config), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["fit", *options])
    assert done.exit_code == 0, done.output
    assert "linear probe" in done.stdout
    refused = CliRunner().invoke(app, ["export", *options])
    assert refused.exit_code == 2
    assert 'model is "mopoe"; a bundle holds a "concord" alone' in refused.stderr


def test_a_rival_has_a_hash_of_its_own(make_config: Any) -> None:
    assert make_config(model="concord").sha256 == make_config().sha256 != make_config(model="mvae").sha256
