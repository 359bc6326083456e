"""The command line: a whole run, and every mistake answered in words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from model.runtime import Runtime
from training import __main__ as command_line
from training.__main__ import app

ROOT = Path(command_line.__file__).parent.parent


def refused(*arguments: object) -> str:
    """What the command line says to a mistake."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert result.stdout == ""
    return result.stderr


def test_a_whole_run_makes_a_bundle_that_opens(finished: Any) -> None:
    runtime = Runtime.load(finished.bundle, threads=1)
    assert runtime.replay_golden() <= 1e-4
    assert [m.name for m in runtime.modalities] == ["digit", "photo", "word"]
    inputs = {m.name: np.zeros((2, *m.shape), m.dtype) for m in runtime.modalities}
    posterior = runtime.encode(inputs, np.array([[True, False, False], [False, True, True]]))
    assert runtime.decode("photo", posterior.mean).shape == (2, 3, 32, 32)


def test_what_a_run_prints(finished: Any) -> None:
    for text in ("linear probe", "digit+photo+word", "refinement, 2 steps", "training: ", f"fit {finished.config}"[4:]):
        assert text in finished.fitted
    assert f"python -m training export {finished.config} --out {finished.folder}" in finished.fitted
    assert f"CONCORD_BUNDLE={finished.bundle} python -m service" in finished.exported
    assert "tiny 1," in finished.exported


def test_a_run_keeps_what_it_measured(finished: Any) -> None:
    figures = json.loads((finished.folder / "evaluation.json").read_text())
    assert figures["training"]["seconds"] > 0
    assert figures["training"]["stages"].keys() == {"joint", "refiner", "align"}
    assert sorted(p.name for p in finished.folder.iterdir()) == [
        "bundle",
        "checkpoint.pt",
        "config.json",
        "evaluation.json",
        "grid.png",
        "judge-digit.pt",
        "judge-photo.pt",
        "metrics.jsonl",
    ]
    assert figures["coherence"]["cross"]["digit"].keys() == {"photo", "word"}
    assert len(figures["refined"]["coherence"]) == 1 + 2 * 2  # to twice the horizon


def test_evaluate_repeats_the_figures(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    result = CliRunner().invoke(app, ["evaluate", str(finished.config), "--out", str(run)])
    assert result.exit_code == 0, result.output
    assert json.loads((run / "evaluation.json").read_text()) == before


def test_fit_again_trains_nothing_and_evaluates(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = (run / "checkpoint.pt").read_bytes()
    result = CliRunner().invoke(app, ["fit", str(finished.config), "--out", str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "checkpoint.pt").read_bytes() == before
    assert "joint: step" not in result.stderr


def test_data_may_lie_elsewhere(write_config: Any, digits_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """--data comes before CONCORD_DATA, which comes before the configuration."""
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(
        tmp_path / "c.toml", data={"folder": "/none"}, joint=stage, refiner={**stage, "steps": 1}, align=stage
    )
    monkeypatch.setenv("CONCORD_DATA", str(tmp_path))
    assert "mnist-train.parquet" in refused("fit", config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run"), "--data", str(digits_folder)])
    assert result.exit_code == 0, result.output


def test_a_seed_of_its_own(write_config: Any, tmp_path: Path) -> None:
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(tmp_path / "c.toml", joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = [str(config), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["fit", *options, "--seed", "7"])
    assert result.exit_code == 0, result.output
    hint = result.stdout.rpartition("python -m training ")[2].split()
    assert hint[-2:] == ["--seed", "7"]
    assert "another configuration" in refused("export", *options)
    result = CliRunner().invoke(app, hint)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "bundle" / "manifest.json").exists()
    assert CliRunner().invoke(app, ["fit", *options, "--seed", "-1"]).exit_code == 2


def test_fresh_starts_over_and_removes_runs_only(write_config: Any, finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    stage = {"epochs": 1, "batch_size": 60}
    other = write_config(tmp_path / "other.toml", seed=7, joint=stage, refiner={**stage, "steps": 1}, align=stage)
    assert "another configuration" in refused("fit", other, "--out", run)
    elsewhere = write_config(tmp_path / "elsewhere.toml", data={"folder": "/none"})
    refused("fit", elsewhere, "--out", run, "--fresh")
    assert (run / "checkpoint.pt").read_bytes() == (finished.folder / "checkpoint.pt").read_bytes()
    result = CliRunner().invoke(app, ["fit", str(other), "--out", str(run), "--fresh"])
    assert result.exit_code == 0, result.output
    assert json.loads((run / "config.json").read_text())["seed"] == 7
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    assert "no run's folder" in refused("fit", other, "--out", tmp_path / "thesis", "--fresh")
    assert (tmp_path / "thesis" / "text").exists()


@pytest.mark.parametrize("command", [[], ["fit"], ["evaluate"], ["export"]])
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    for word in ["CONFIG", "--data", "--out"] if command else ["fit", "evaluate", "export"]:
        assert word in result.output


@pytest.mark.parametrize("command", ["fit", "evaluate", "export"])
def test_a_wrong_configuration_is_answered_by_name(write_config: Any, tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path / "c.toml", epoch=3, align={"learning_rat": 1.0})
    said = refused(command, config, "--out", tmp_path / "run")
    assert f"error: {config}" in said
    assert "epoch: unknown key" in said
    assert "align.learning_rat: unknown key: did you mean 'learning_rate'?" in said
    assert "cannot be read" in refused(command, tmp_path / "missing.toml")
    (tmp_path / "c.toml").write_text("not toml")
    assert "not TOML" in refused(command, config)


def test_a_run_that_is_not_there_yet(finished: Any, tmp_path: Path) -> None:
    for command in ("evaluate", "export"):
        assert "no such run. Run fit first" in refused(command, finished.config, "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()
        run = Path(shutil.copytree(finished.folder, tmp_path / command))
        (run / "checkpoint.pt").unlink()
        before = (run / "metrics.jsonl").read_text()
        assert "the run has not finished. Run fit again" in refused(command, finished.config, "--out", run)
        assert (run / "metrics.jsonl").read_text() == before
    run = Path(shutil.copytree(finished.folder, tmp_path / "unmeasured"))
    (run / "evaluation.json").unlink()
    assert "Run fit, then evaluate, first" in refused("export", finished.config, "--out", run)


def test_a_damaged_run(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (run / "checkpoint.pt").write_bytes(b"damaged")
    for command in ("fit", "evaluate", "export"):
        assert "checkpoint.pt: cannot be read" in refused(command, finished.config, "--out", run)


def test_what_the_disk_says_is_passed_on(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in refused("fit", finished.config, "--out", tmp_path / "file")


def test_divergence_is_answered(write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", joint={"learning_rate": 1e30})
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "Lower joint.learning_rate" in result.stderr


def test_the_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training"]
    done = subprocess.run([*command, "fit", str(tmp_path / "c.toml")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'c.toml'}: cannot be read")
    assert "Traceback" not in done.stderr
