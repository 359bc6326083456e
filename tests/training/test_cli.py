"""The command line: a complete run, and errors that exit with a message."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from concord.model.runtime import Runtime
from concord.training import commands, distributed
from concord.training.cli import app
from tests.support.server import ROOT


def error_of(*arguments: object) -> str:
    """Run a command that fails, and return its error output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert result.stdout == ""
    return result.stderr


def test_fit_and_export_make_a_bundle_that_loads(finished: Any) -> None:
    runtime = Runtime.load(finished.bundle, threads=1)
    assert runtime.replay_golden() <= 1e-4
    assert [m.name for m in runtime.modalities] == ["digit", "photo", "word"]
    inputs = {m.name: np.zeros((2, *m.shape), m.dtype) for m in runtime.modalities}
    posterior = runtime.encode(inputs, np.array([[True, False, False], [False, True, True]]))
    assert runtime.decode("photo", posterior.mean).shape == (2, 3, 32, 32)


def test_fit_and_export_print_figures_and_the_next_command(finished: Any) -> None:
    for text in (
        "linear probe",
        "digit+photo+word",
        "refinement, 2 steps",
        "steps, coherence, from 1 modality: ",
        "training: ",
        f"fit {finished.config}"[4:],
    ):
        assert text in finished.fit_output
    assert f"concord export {finished.config} --out {finished.folder}" in finished.fit_output
    assert f"CONCORD_BUNDLE={finished.bundle} concord" in finished.export_output
    assert "tiny 1," in finished.export_output


def test_fit_writes_figures_and_files_of_the_run(finished: Any) -> None:
    figures = json.loads((finished.folder / "evaluation.json").read_text())
    assert figures["training"]["seconds"] > 0
    assert figures["training"]["stages"].keys() == {"joint", "refiner", "align"}
    assert sorted(p.name for p in finished.folder.iterdir()) == [
        "bundle",
        "checkpoint.pt",
        "classifier-digit.pt",
        "classifier-photo.pt",
        "config.json",
        "data.json",
        "evaluation.json",
        "export.npz",
        "grid.png",
        "lock",
        "metrics.jsonl",
    ]
    assert figures["coherence"]["cross"]["digit"].keys() == {"photo", "word"}
    assert len(figures["refined"]["coherence"]) == 1 + 2 * 2  # up to twice the horizon


def test_evaluate_reproduces_the_figures_and_the_inputs_of_export_of_fit(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = json.loads((run / "evaluation.json").read_text())
    for file in ("evaluation.json", "export.npz"):
        (run / file).unlink()
    result = CliRunner().invoke(app, ["evaluate", str(finished.config), "--out", str(run)])
    assert result.exit_code == 0, result.output
    figures = json.loads((run / "evaluation.json").read_text())
    for measured in (before, figures):
        assert measured["training"].pop("peak_memory_bytes") > 0  # of the process
    assert figures == before
    with np.load(run / "export.npz") as arrays, np.load(finished.folder / "export.npz") as expected:
        assert list(arrays) == list(expected)
        assert all(np.array_equal(array, expected[name]) for name, array in arrays.items())


def test_fit_of_a_finished_run_evaluates_a_limited_number_of_test_rows_without_training(
    finished: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    assert commands.REFINED_ROWS == 2000
    monkeypatch.setattr(commands, "REFINED_ROWS", 10)
    monkeypatch.setattr("concord.training.evaluation.evaluate.BATCH_ROWS", 5)
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = (run / "checkpoint.pt").read_bytes()
    result = CliRunner().invoke(app, ["fit", str(finished.config), "--out", str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "checkpoint.pt").read_bytes() == before
    assert "joint: step" not in result.stderr
    assert json.loads((run / "evaluation.json").read_text())["refinement"]["rows"] == 10


def test_data_option_overrides_environment_and_configuration(
    write_config: Any, digits_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """--data overrides CONCORD_DATA, which overrides the configuration."""
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(
        tmp_path / "c.toml", data={"folder": "/none"}, joint=stage, refiner={**stage, "steps": 1}, align=stage
    )
    monkeypatch.setenv("CONCORD_DATA", str(tmp_path))
    assert "mnist-train.parquet" in error_of("fit", config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists(), "an error leaves no folder behind"
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run"), "--data", str(digits_folder)])
    assert result.exit_code == 0, result.output


def test_seed_option_overrides_the_configuration(write_config: Any, tmp_path: Path) -> None:
    stage = {"epochs": 1, "batch_size": 60}
    config = write_config(tmp_path / "c.toml", joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = [str(config), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["fit", *options, "--seed", "7"])
    assert result.exit_code == 0, result.output
    hint = result.stdout.rpartition("concord ")[2].split()
    assert hint[-2:] == ["--seed", "7"]
    assert "another configuration" in error_of("export", *options)
    result = CliRunner().invoke(app, hint)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "bundle" / "manifest.json").exists()
    assert CliRunner().invoke(app, ["fit", *options, "--seed", "-1"]).exit_code == 2


def test_shorter_run_by_options_has_the_configuration_with_these_values(write_config: Any, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "c.toml"), tmp_path / "run"
    shorter = ["--epochs", "1", "--rows-per-epoch", "40"]
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(run), *shorter])
    assert result.exit_code == 0, result.output
    hint = result.stdout.rpartition("concord ")[2].split()
    assert hint == ["export", str(config), "--out", str(run), *shorter]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["epoch"]) for line in metrics] == [
        (name, 2, 1) for name in ("joint", "refiner", "align")
    ]
    stage = {"epochs": 1}
    written = write_config(tmp_path / "written.toml", data={"rows_per_epoch": 40}, joint=stage, refiner=stage, align=stage)
    assert CliRunner().invoke(app, ["evaluate", str(written), "--out", str(run)]).exit_code == 0
    assert CliRunner().invoke(app, ["evaluate", str(config), "--out", str(run), *shorter]).exit_code == 0
    for options in ([], shorter[:2], shorter[2:]):
        assert "another configuration" in error_of("evaluate", config, "--out", run, *options)
    assert "rows_per_epoch is 61, but the file has 60 rows" in error_of(
        "fit", config, "--out", tmp_path / "other", "--rows-per-epoch", 61
    )
    for wrong in ("0", "-1", "many"):
        assert CliRunner().invoke(app, ["fit", str(config), "--epochs", wrong]).exit_code == 2


def test_fit_prints_a_line_at_once_and_the_time_of_the_whole_training(write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml")
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == "reading the training rows"
    assert any(re.fullmatch(r"training takes about \d+ s with 1 thread; evaluation follows", line) for line in lines)
    assert any(re.fullmatch(r"joint: step 1 of 6  elbo .* training left \d+ s", line) for line in lines)
    assert re.search(r"training: \d+ s, peak memory of the process: \d+ MiB", result.stdout)


def test_check_prints_the_time_of_the_whole_training(write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", joint={"epochs": 100_000})
    result = CliRunner().invoke(app, ["check", str(config)])
    assert result.exit_code == 0, result.output
    (hours,) = re.findall(r"training takes about (\d+) (?:h \d+ )?min with 1 thread", result.stdout)
    assert int(hours) > 1
    shorter = CliRunner().invoke(app, ["check", str(config), "--epochs", "1"])
    assert re.search(r"training takes about \d+ s with", shorter.stdout)
    assert f"concord fit {config} --epochs 1" in shorter.stdout


def test_fit_of_a_baseline_proposes_no_export(write_config: Any, tmp_path: Path) -> None:
    stage = {"epochs": 1, "batch_size": 60}
    for model, is_exportable in (("mvae", False), ("concord", True)):
        config = write_config(tmp_path / f"{model}.toml", model=model, joint=stage, refiner={**stage, "steps": 1}, align=stage)
        result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / model)])
        assert result.exit_code == 0, result.output
        assert ("export it with" in result.stdout) == is_exportable


def test_fresh_replaces_a_run_and_no_other_folder(write_config: Any, finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    stage = {"epochs": 1, "batch_size": 60}
    other = write_config(tmp_path / "other.toml", seed=7, joint=stage, refiner={**stage, "steps": 1}, align=stage)
    assert "another configuration" in error_of("fit", other, "--out", run)
    without_data = write_config(tmp_path / "without_data.toml", data={"folder": "/none"})
    error_of("fit", without_data, "--out", run, "--fresh")
    assert (run / "checkpoint.pt").read_bytes() == (finished.folder / "checkpoint.pt").read_bytes()
    result = CliRunner().invoke(app, ["fit", str(other), "--out", str(run), "--fresh"])
    assert result.exit_code == 0, result.output
    assert json.loads((run / "config.json").read_text())["seed"] == 7
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years of work")
    assert "is not the folder of a run" in error_of("fit", other, "--out", tmp_path / "thesis", "--fresh")
    assert (tmp_path / "thesis" / "text").exists()


@pytest.mark.parametrize("command", [[], ["fit"], ["evaluate"], ["export"]])
def test_help_names_commands_and_options(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    for word in ["CONFIG", "--data", "--out"] if command else ["fit", "evaluate", "export"]:
        assert word in result.output


@pytest.mark.parametrize("command", ["fit", "evaluate", "export"])
def test_invalid_configuration_is_reported_with_its_place(write_config: Any, tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path / "c.toml", epoch=3, align={"learning_rat": 1.0})
    error = error_of(command, config, "--out", tmp_path / "run")
    assert f"error: {config}" in error
    assert "epoch: unknown key" in error
    assert "align.learning_rat: unknown key: did you mean 'learning_rate'?" in error
    assert "cannot be read" in error_of(command, tmp_path / "missing.toml")
    (tmp_path / "c.toml").write_text("not toml")
    assert "not TOML" in error_of(command, config)


def test_missing_unfinished_or_unevaluated_run_is_rejected(finished: Any, tmp_path: Path) -> None:
    for command in ("evaluate", "export"):
        assert "no such run. Run fit first" in error_of(command, finished.config, "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()
        run = Path(shutil.copytree(finished.folder, tmp_path / command))
        (run / "checkpoint.pt").unlink()
        before = (run / "metrics.jsonl").read_text()
        assert "the run has not finished. Run fit again" in error_of(command, finished.config, "--out", run)
        assert (run / "metrics.jsonl").read_text() == before
    run = Path(shutil.copytree(finished.folder, tmp_path / "unevaluated"))
    (run / "evaluation.json").unlink()
    assert "Run fit or evaluate first" in error_of("export", finished.config, "--out", run)


def test_run_with_a_damaged_checkpoint_is_rejected(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    (run / "checkpoint.pt").write_bytes(b"damaged")
    for command in ("fit", "evaluate", "export"):
        assert "checkpoint.pt: cannot be read" in error_of(command, finished.config, "--out", run)


def test_error_of_the_operating_system_names_the_path(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in error_of("fit", finished.config, "--out", tmp_path / "file")


def test_divergence_exits_with_a_remedy(write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", joint={"learning_rate": 1e30})
    result = CliRunner().invoke(app, ["fit", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "Lower joint.learning_rate" in result.stderr


def test_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "concord.service"]
    result = subprocess.run([*command, "fit", str(tmp_path / "c.toml")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'c.toml'}: cannot be read")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["init", "check", "evaluate", "export", "compare", "report"])
def test_command_under_torchrun_is_rejected_unless_it_is_fit(
    finished: Any, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    arguments = [] if command == "report" else [finished.config]
    assert "torchrun started several processes, but only fit supports that" in error_of(command, *arguments)
