"""The search for settings: resumable, and measured on held-out training rows."""

import re
import tomllib
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from concord.model.installation import not_installed
from concord.training import config_file, tune
from concord.training.cli import app
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.errors import ConfigError, DivergenceError, RunError
from concord.training.fit import build
from concord.training.progress import Progress
from concord.training.tune import SPACE, Candidate

STAGE = {"epochs": 1, "batch_size": 20}
PLAN: dict[str, Any] = {"joint": STAGE, "refiner": {**STAGE, "steps": 1}, "align": STAGE}
TRIALS = 3


@pytest.fixture(autouse=True)
def _optuna() -> None:
    pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def settings(make_config: Any) -> Config:
    config: Config = make_config(**PLAN)
    return config


@pytest.fixture(scope="module")
def rows(settings: Config) -> dataset.Dataset:
    return dataset.load(settings, "train")


def search(settings: Config, rows: dataset.Dataset, folder: Path, trials: int = TRIALS) -> list[Candidate]:
    folder.mkdir(exist_ok=True)
    return tune.tune(settings, rows, folder, trials, Progress(quiet=True))


@pytest.fixture(scope="module")
def finished(settings: Config, rows: dataset.Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    pytest.importorskip("optuna")
    return search(settings, rows, tmp_path_factory.mktemp("finished") / "search")


def test_first_trial_has_the_settings_of_the_configuration(settings: Config, finished: list[Candidate]) -> None:
    (first,) = [trial for trial in finished if trial.number == 0]
    assert first.settings == {
        "learning_rate": settings.joint.learning_rate,
        "objective.beta": settings.objective.beta,
        "align.reconstruction": settings.align.reconstruction,
        "align.multimodal_weight": settings.align.multimodal_weight,
        "align.jmvae_weight": settings.align.jmvae_weight,
    }


def test_learning_rates_keep_their_ratio(settings: Config) -> None:
    rates = {"joint": 1e-3, "contrast": 3e-3}
    config = settings.model_copy(
        update={name: getattr(settings, name).model_copy(update={"learning_rate": rate}) for name, rate in rates.items()}
    )
    tuned = tune.with_settings(config, {"learning_rate": 2e-3})
    assert (tuned.joint.learning_rate, tuned.contrast.learning_rate) == pytest.approx((2e-3, 6e-3))
    assert tune.with_settings(config, {"learning_rate": 1e-3}).sha256 == config.sha256, "the first run"


def test_search_does_not_continue_with_other_data(settings: Config, rows: dataset.Dataset, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "search"
    search(settings, rows, folder, trials=0)
    other = copy(rows)
    other.sources = [source.model_copy(update={"sha256": "0" * 64}) for source in rows.sources]
    with pytest.raises(RunError, match=r"other data: .*sha256"):
        search(settings, other, folder, trials=0)


def test_trials_are_sorted_by_score_within_the_space(finished: list[Candidate]) -> None:
    scores = [trial.score for trial in finished if trial.score is not None]
    assert len(scores) == len(finished) == TRIALS
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(trial.settings.values()) for trial in finished}) == TRIALS
    for trial in finished:
        assert all(SPACE[name][0] <= value <= SPACE[name][1] for name, value in trial.settings.items())


def test_interrupted_search_ends_with_the_same_trials(
    settings: Config, rows: dataset.Dataset, finished: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two trials and in the middle of one, whose settings are tried again."""
    folder = tmp_path / "search"
    assert len(search(settings, rows, folder, 1)) == 1

    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "cross_modal_log_likelihood", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search(settings, rows, folder)
    runs = {file.parent for file in folder.glob("*/checkpoint.pt")}
    found = search(settings, rows, folder)
    assert [(trial.settings, trial.score) for trial in found] == [(trial.settings, trial.score) for trial in finished]
    assert len(runs) == 2
    assert len(list(folder.glob("*/checkpoint.pt"))) == TRIALS, "the interrupted trial continued in its folder"


def test_search_of_another_configuration_is_rejected(
    settings: Config, make_config: Any, rows: dataset.Dataset, tmp_path: Path
) -> None:
    search(settings, rows, tmp_path, 1)
    with pytest.raises(RunError, match="holds a search for another configuration"):
        search(make_config(**PLAN, seed=5), rows, tmp_path, 1)


def test_diverging_trial_counts_and_ranks_last(
    settings: Config, rows: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = tune.fit, iter(range(9))

    def fit(*arguments: Any) -> Any:
        if next(count) == 0:
            raise DivergenceError("the loss is nan")
        return original(*arguments)

    monkeypatch.setattr(tune, "fit", fit)
    found = search(settings, rows, tmp_path, 2)
    assert [trial.number for trial in found] == [1, 0]
    assert found[1].score is None


def test_setting_that_is_switched_off_stays_off(make_config: Any, rows: dataset.Dataset, tmp_path: Path) -> None:
    (trial,) = search(make_config(**{**PLAN, "align": {**STAGE, "jmvae_weight": 0}}), rows, tmp_path, 1)
    assert "align.jmvae_weight" not in trial.settings


def test_score_is_the_mean_over_rows_of_predictions_from_single_modalities(settings: Config, rows: dataset.Dataset) -> None:
    """By a loop over rows and modalities, with posteriors of almost no variance."""
    model = build(settings, rows.modalities).eval()
    with torch.no_grad():
        for encoder in (model.aligned.fusion[-1],):
            encoder.weight[4:].zero_()
            encoder.bias[4:] = -1e9
    held_out = rows.hold_out(9)[1]
    (batch,) = held_out.batches(0, 9, 0, shuffle=False)
    expected = []
    for row in range(9):
        one = batch.take(slice(row, row + 1))
        of_row = []
        for index in torch.nonzero(one.present[0]).flatten().tolist():
            mask = torch.zeros_like(one.present)
            mask[0, index] = True
            z = model.aligned(one.arrays, mask).mean.unsqueeze(1)
            of_row.append(model.weighted_log_likelihood(one.arrays, one.present, z).item())
        expected.append(sum(of_row) / len(of_row))
    score = tune.cross_modal_log_likelihood(model, held_out, settings)
    assert score == pytest.approx(sum(expected) / 9, rel=5e-3)


def test_command_prints_the_trials_and_writes_picture_and_configuration(write_config: Any, tmp_path: Path) -> None:
    config, folder = write_config(tmp_path / "tiny.toml", **PLAN), tmp_path / "search"
    result = CliRunner().invoke(app, ["tune", str(config), "--runs", "2", "--out", str(folder), "--rows-per-epoch", "40"])
    assert result.exit_code == 0, result.output
    assert "runs, the best first" in result.stdout
    assert re.search(rf"concord fit {re.escape(str(folder))}/best\.toml", result.stdout.replace("\n", ""))
    with Image.open(folder / "tune.png") as picture:
        assert picture.width > picture.height > 100
    best = config_file.read(folder / "best.toml")
    tables = tomllib.loads((folder / "best.toml").read_text())
    assert tables["extends"] == "../tiny.toml"
    assert best.name == "tiny-tuned"
    assert best.joint.learning_rate == best.align.learning_rate == tables["joint"]["learning_rate"]
    assert best.objective.beta == tables["objective"]["beta"]
    assert best.data.sources == config_file.read(config).data.sources


def test_missing_optuna_is_reported_with_its_extra(
    settings: Config, rows: dataset.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=re.escape(not_installed("optuna", "tune", "tune"))):
        search(settings, rows, tmp_path)


def test_baseline_is_rejected(make_config: Any, rows: dataset.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='received "mvae"'):
        search(make_config(**PLAN, model="mvae"), rows, tmp_path)
