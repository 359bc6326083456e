"""A comparison on the generated digits: finished rows, a failed row, and no row run twice."""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from concord.training import config_file
from concord.training.cli import app
from concord.training.errors import ConfigError
from concord.training.progress import Progress
from concord.training.reports import compare
from concord.training.reports.compare import Plan, summary

SUBSETS = ["digit", "photo", "word", "digit+photo", "digit+word", "photo+word", "digit+photo+word"]


@pytest.fixture(scope="module")
def compared(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of Concord, a baseline and a model that fails. A second call with Concord has nothing to run."""
    folder = tmp_path_factory.mktemp("compared")
    stage = {"epochs": 1, "batch_size": 20}
    config = write_config(folder / "tiny.toml", photo=True, joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = ["compare", str(config), "--test-rows", "8", "--rows-per-epoch", "40", "--seeds", "0"]
    options += ["--out", str(folder / "runs"), "--results", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        (folder / "runs" / "mopoe-0").mkdir(parents=True)
        (folder / "runs" / "mopoe-0" / "config.json").write_text("damaged")
        first = CliRunner().invoke(app, [*options, "--models", "concord,mvae,mopoe"])
        assert first.exit_code == 0, first.output
        patch.setattr(compare, "_run_in_subprocess", lambda *_: pytest.fail("nothing is missing"))
        second = CliRunner().invoke(app, [*options, "--models", "concord"])
        assert second.exit_code == 0, second.output
    return folder, config, first.stdout, json.loads((folder / "results" / "tiny-40.json").read_text())


def test_compare_rows_have_status_and_error(compared: Any) -> None:
    _, _, output, content = compared
    rows = {(row["model"], row["seed"]): row for row in content["rows"]}
    assert {key: row["status"] for key, row in rows.items()} == {
        ("concord", 0): "done",
        ("mvae", 0): "done",
        ("mopoe", 0): "failed",
    }
    assert "damaged" in rows["mopoe", 0]["error"]
    assert "mopoe, seed 0: failed: RunError" in output


def test_compare_file_has_name_budget_command_and_data(compared: Any) -> None:
    _, config, _, content = compared
    assert content["name"] == "tiny-40"
    assert content["budget"] == {"rows_per_epoch": 40, "epochs": 3, "reduced": True}
    assert content["command"] == (f"concord compare {config} --models concord --seeds 0 --test-rows 8 --rows-per-epoch 40")
    assert [entry["file"] for entry in content["data"]] == [
        f"{name}-{split}.parquet" for split in ("train", "test") for name in ("mnist", "mnist-m")
    ]
    assert all(len(entry["sha256"]) == 64 for entry in content["data"])


def test_compare_rows_have_all_metrics(compared: Any) -> None:
    *_, content = compared
    rows = {(row["model"], row["seed"]): row for row in content["rows"]}
    assert content["frechet_features"] == "penultimate layer of the frozen classifier"
    for row in (rows["concord", 0], rows["mvae", 0]):
        assert row["classifier_accuracy"].keys() == {"digit", "photo"}
        assert [name for name in row["probe"] if name != "joint"] == SUBSETS
        assert list(row["coherence"]["cross"]) == SUBSETS[:-1]
        assert row["coherence"]["cross"]["digit"].keys() == {"photo", "word"}
        assert row["frechet"].keys() == {"photo", "word", "digit", "photo+word", "digit+word", "prior"}
        assert all(-1 <= row["cosine"][name]["matched"] <= 1 for name in SUBSETS[:3])
        assert math.isfinite(row["log_likelihood"]["joint"])
        assert 1 <= row["log_likelihood"]["effective"] <= row["log_likelihood"]["samples"]
        assert row["texts"]["word"].keys() == {"digit", "photo", "word", "others"}
        assert row["seconds"] > 0
        assert row["peak_memory_bytes"] > 1e7
    assert len(rows["concord", 0]["gap"]["closed_by_step"]) == 1 + 2
    assert rows["concord", 0]["gap_closed"] == rows["concord", 0]["gap"]["closed_by_step"][1]
    assert len(rows["concord", 0]["refined"]["coherence"]) == 1 + 2
    assert rows["concord", 0]["requests"]["present"]["2"]["coherence"].keys() == {"digit", "photo", "word"}
    assert rows["mvae", 0]["gap_closed"] is None


def test_compare_rows_with_other_classifiers_are_failed_or_removed(compared: Any) -> None:
    *_, content = compared
    key = "classifier_accuracy"
    assert content[key] == content["rows"][0][key]
    finished: list[dict[str, Any]] = [{"status": "done", key: {"digit": accuracy}} for accuracy in (0.8, 0.9, 0.9, 0.8)]
    rows = {("mvae", seed): row for seed, row in enumerate([*finished, {"status": "missing"}])}
    assert compare._shared(key, rows, [("mvae", seed) for seed in (2, 3, 4)]) == {"digit": 0.9}
    assert {seed: row["status"] for (_, seed), row in rows.items()} == {1: "done", 2: "done", 3: "failed", 4: "missing"}
    assert rows["mvae", 3]["error"] == "was run with other frozen classifiers: remove its folder to run it again"


def test_compare_rows_of_older_runs_keep_their_classifier_accuracy(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results files and run folders of older versions have the key "judges"."""
    folder, config, *_ = compared
    monkeypatch.setattr(compare, "_run_in_subprocess", lambda *_: pytest.fail("nothing is missing"))
    for file, copy in (("results/tiny-40.json", "tiny-40.json"), ("runs/concord-0/row.json", "runs/concord-0/row.json")):
        (tmp_path / copy).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / copy).write_text((folder / file).read_text().replace('"classifier_accuracy"', '"judges"'))
    for name in ("digit", "photo"):
        (tmp_path / "runs" / f"classifier-{name}.pt").touch()
    options = ["--test-rows", "8", "--rows-per-epoch", "40", "--seeds", "0", "--models", "concord"]
    options += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    result = CliRunner().invoke(app, ["compare", str(config), *options])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "tiny-40.json").read_text())
    assert {row["model"]: row["status"] for row in content["rows"]} == {"concord": "done", "mvae": "done", "mopoe": "failed"}
    assert content["classifier_accuracy"] == content["rows"][0]["classifier_accuracy"]
    assert "judges" not in (tmp_path / "tiny-40.json").read_text()


def test_compare_by_row_writes_the_evaluation_of_each_run_and_continues(
    write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stage = {"epochs": 1, "batch_size": 20}
    config = write_config(tmp_path / "tiny.toml", joint=stage, refiner={**stage, "steps": 1}, align=stage)
    options = ["compare", str(config), "--models", "concord,contrastive", "--seeds", "0", "--test-rows", "8"]
    options += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    (tmp_path / "runs" / "contrastive-0").mkdir(parents=True)
    (tmp_path / "runs" / "contrastive-0" / "config.json").write_text("damaged")
    first = CliRunner().invoke(app, options)
    assert first.exit_code == 0, first.output
    assert "concord, seed 0: done" in first.stdout
    assert "contrastive, seed 0: failed: RunError" in first.stdout
    shutil.rmtree(tmp_path / "runs" / "contrastive-0")
    written = (tmp_path / "results" / "tiny" / "concord-0.json").read_bytes()
    second = CliRunner().invoke(app, options)
    assert "contrastive, seed 0: done" in second.stdout, second.output
    assert (tmp_path / "results" / "tiny" / "concord-0.json").read_bytes() == written, "an evaluated run is not repeated"
    figures = {
        name: json.loads((tmp_path / "results" / "tiny" / f"{name}-0.json").read_text()) for name in ("concord", "contrastive")
    }
    assert figures["concord"].keys() >= {"probe", "refinement", "linear", "training"}
    assert figures["contrastive"].keys() >= {"probe", "training"}
    assert "linear" not in figures["contrastive"], "the linear baselines have no seed: once is enough"


def test_compare_by_row_fits_linear_baselines_for_a_first_run_that_was_evaluated_without_them(
    write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"epochs": 1, "batch_size": 20}
    config = config_file.read(write_config(tmp_path / "c.toml", joint=stage, refiner={**stage, "steps": 1}, align=stage))
    plan, runs, results = Plan(config, ("contrastive",), (0,), None, 8), tmp_path / "runs", tmp_path / "results"
    (runs / "contrastive-0").mkdir(parents=True)
    compare._fit_and_evaluate(runs / "contrastive-0", plan.config_for("contrastive", 0), None, None, 8, baselines=False)
    file, checkpoint = runs / "contrastive-0" / "evaluation.json", runs / "contrastive-0" / "checkpoint.pt"
    before, trained = json.loads(file.read_text()), checkpoint.read_bytes()
    assert "linear" not in before

    monkeypatch.setattr(compare, "_run_in_subprocess", lambda function, *arguments: function(*arguments))
    assert compare.compare_by_row(plan, None, runs, results, Progress()) == {("contrastive", 0): None}
    figures = json.loads((results / config.name / "contrastive-0.json").read_text())
    assert figures["linear"]
    assert figures["probe"] == before["probe"]
    assert checkpoint.read_bytes() == trained


@pytest.mark.parametrize("by_class", [False, True])
def test_compare_with_held_out_rows_reads_no_test_rows_and_has_its_own_folders(
    write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_class: bool
) -> None:
    measured: dict[str, Any] = {}

    def evaluate(*arguments: Any, **_: Any) -> dict[str, Any]:
        _, _, train, test, *_ = arguments
        measured["rows"] = (set(train._rows), set(test._rows), {source.file for source in test.sources})
        return {}

    monkeypatch.setattr(compare, "evaluate", evaluate)

    def frozen_classifiers(*arguments: Any) -> dict[str, Any]:
        measured.setdefault("classifiers", []).append(set(arguments[1]._rows))
        return {}

    monkeypatch.setattr(compare, "frozen_classifiers", frozen_classifiers)
    monkeypatch.setattr(compare, "evaluate_comparison", lambda *_, bounds: measured.update(bounds=bounds) or {})
    monkeypatch.setattr(compare, "render_grid", lambda *_: Image.new("L", (1, 1)))
    monkeypatch.setattr(compare, "fit", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(compare.Run, "cost", lambda _: {"seconds": 1, "peak_memory_bytes": 1})
    monkeypatch.setattr(compare, "_run_in_subprocess", lambda function, *arguments: function(*arguments))
    config = write_config(tmp_path / "tiny.toml", photo=by_class)
    options = ["--models", "concord", "--seeds", "0", "--held-out", "8", "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, ["compare", str(config), *options, "--results", str(tmp_path / "results")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results" / f"tiny-held-out-8{'.json' if by_class else '/concord-0.json'}").exists()
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["held-out-8"], "no other run is continued"
    train, test, files = measured["rows"]
    assert len(test) == 8
    assert not train & test
    assert train | test == set(range(len(train) + 8))
    assert not any("test" in file for file in files)
    assert measured.get("classifiers", []) == ([train, train] if by_class else [])
    assert measured.get("bounds") == (False if by_class else None), "settings are not chosen by what takes most of the time"
    if by_class:
        written = json.loads((tmp_path / "results" / "tiny-held-out-8.json").read_text())
        assert (written["held_out"], written["beta"]) == (8, config_file.read(config).objective.beta)


def test_compare_by_row_fits_linear_baselines_in_the_first_run_that_succeeds(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(_: Any, path: Path, *arguments: Any) -> str | None:
        asked.append((path.name, arguments[-1]))
        if path.name == "concord-0":
            return "out of memory"
        path.mkdir(parents=True)
        (path / "evaluation.json").touch()
        return None

    monkeypatch.setattr(compare, "_run_in_subprocess", run)
    plan = Plan(make_config(), ("concord", "contrastive"), (0, 1), None, 8)
    compare.compare_by_row(plan, None, tmp_path, tmp_path / "results", Progress())
    assert asked == [("concord-0", True), ("contrastive-0", True), ("concord-1", False), ("contrastive-1", False)]


def test_summary_has_means_and_deviations_over_seeds(compared: Any) -> None:
    *_, content = compared
    models = content["models"]
    row = next(row for row in content["rows"] if row["model"] == "mvae")
    assert models["mvae"]["mean"]["probe"] == row["probe"]
    assert models["mvae"]["std"]["probe"]["photo"] is None  # one seed
    assert "mopoe" not in models
    other = {**row, "seed": 1, "probe": {name: value + 0.2 for name, value in row["probe"].items()}}
    two_seeds = summary([row, other])["mvae"]
    assert two_seeds["seeds"] == 2
    assert two_seeds["mean"]["probe"]["photo"] == pytest.approx(row["probe"]["photo"] + 0.1)
    assert two_seeds["std"]["probe"]["photo"] == pytest.approx(statistics.stdev((0, 0.2)))
    assert two_seeds["std"]["coherence"]["joint"] == 0


def test_summary_metric_missing_in_one_seed_is_none() -> None:
    rows = [{"model": "a", "seed": s, "status": "done", "gap_closed": v, "seconds": 1.0} for s, v in enumerate((None, 0.5))]
    assert summary(rows)["a"]["mean"]["gap_closed"] is None
    assert summary(rows)["a"]["mean"]["seconds"] == 1


def test_summary_has_texts_if_rows_have_them() -> None:
    row = {"model": "concord", "status": "done"}
    nats = [{**row, "seed": seed, "texts": {"caption": {"photo": {"nats": 2.0 + seed}}}} for seed in (0, 1)]
    assert compare.summary(nats)["concord"]["mean"]["texts"] == {"caption": {"photo": {"nats": 2.5}}}
    assert "texts" not in compare.summary([{**row, "seed": 0}])["concord"]["mean"]


def test_compare_copies_the_grid_of_every_model(compared: Any) -> None:
    folder, *_ = compared
    for run in ("concord-0", "mvae-0"):
        file = folder / "results" / f"tiny-40-grid-{run.partition('-')[0]}.png"
        assert file.read_bytes() == (folder / "runs" / run / "grid.png").read_bytes()
        assert file.stat().st_size < 200_000
        with Image.open(file) as grid:
            assert grid.width > 6 * 36
            assert grid.height > 6 * 3 * 36
            assert len(grid.getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "concord,mvea"], "unknown 'mvea'. Allowed: concord, jmvae"),
        (["--seeds", "0,-1"], "received '0,-1', expected integers of at least 0"),
        (["--seeds", ""], "received '', expected integers of at least 0"),
    ],
)
def test_compare_invalid_options_are_rejected(compared: Any, options: list[str], message: str) -> None:
    _, config, *_ = compared
    result = CliRunner().invoke(app, ["compare", str(config), *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_runs_variants_as_rows_with_their_names(compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config, *_ = compared
    variant = folder / "reversed.toml"
    variant.write_text('extends = "tiny.toml"\nname = "tiny-reversed"\n[align]\ndivergence = "reverse"\n')
    ran = []

    def run_in_subprocess(_: Any, path: Path, settings: Any, *__: Any) -> str:
        ran.append((path.name, settings.name, settings.model, settings.seed, settings.align.divergence))
        return "out of memory"

    monkeypatch.setattr(compare, "_run_in_subprocess", run_in_subprocess)
    options = ["--test-rows", "8", "--rows-per-epoch", "40", "--seeds", "0", "--models", "concord"]
    options += ["--out", str(folder / "runs"), "--results", str(tmp_path)]
    result = CliRunner().invoke(app, ["compare", str(config), str(variant), *options])
    assert result.exit_code == 0, result.output
    assert ran == [("tiny-reversed-0", "tiny-reversed", "concord", 0, "reverse")]  # concord-0 is finished
    content = json.loads((tmp_path / "tiny-40.json").read_text())
    assert [(row["model"], row.get("variant"), row["status"]) for row in content["rows"]] == [
        ("concord", None, "done"),
        ("concord", "tiny-reversed", "failed"),
    ]
    assert f"{config} {variant} --models concord" in content["command"]
    assert "tiny-reversed, seed 0: failed: out of memory" in result.stdout


def test_compare_keeps_earlier_rows_of_the_same_configuration(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = compared
    (tmp_path / "tiny-40.json").write_bytes((folder / "results" / "tiny-40.json").read_bytes())
    monkeypatch.setattr(compare, "_run_in_subprocess", lambda *_: "out of memory")
    options = ["--test-rows", "8", "--rows-per-epoch", "40", "--out", str(folder / "runs"), "--results", str(tmp_path)]

    def rows(changed: str) -> dict[tuple[str, int], str]:
        other = folder / "changed.toml"
        other.write_text(f'extends = "tiny.toml"\nname = "tiny"\n{changed}')
        result = CliRunner().invoke(app, ["compare", str(other), "--models", "jmvae", "--seeds", "7", *options])
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "tiny-40.json").read_text())
        return {(row["model"], row["seed"]): row["status"] for row in content["rows"]}

    added = {("jmvae", 7): "failed"}
    unchanged = rows("")
    assert {("concord", 0), ("mvae", 0), ("jmvae", 7)} <= unchanged.keys()
    assert rows('[align]\ndivergence = "reverse"\n') == {("mvae", 0): "done"} | added  # baselines do not use the option
    assert rows("[objective]\nbeta = 3\n") == added


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the names of models and variants must be unique, received concord, concord"),
        ("[data]\nmemory_mb = 7\n", "concord: its data differ from those of tiny"),
        ("[align]\nepochs = 9\n", "concord trains 11 epochs, tiny 3. Make them equal"),
    ],
)
def test_compare_variants_with_other_data_or_epochs_are_rejected(compared: Any, text: str, message: str) -> None:
    folder, config, *_ = compared
    variant = folder / "other.toml"
    variant.write_text(f'extends = "tiny.toml"\nname = "concord"\n{text}')
    models = "concord" if "unique" in message else "mvae"
    result = CliRunner().invoke(app, ["compare", str(config), str(variant), "--models", models])
    assert result.exit_code == 2
    assert message in result.stderr


def test_variants_may_differ_in_likelihood_weights(make_config: Any) -> None:
    config = make_config()
    weighted = [m.model_copy(update={"weight": 7.0}) for m in config.modalities]
    variant = config.model_copy(update={"name": "weighted", "modalities": tuple(weighted)})
    Plan(config, ("concord",), (0,), None, 8, (variant,)).validate()
    other = variant.model_copy(update={"modalities": tuple(weighted[:1])})
    with pytest.raises(ConfigError, match="its modalities differ"):
        Plan(config, ("concord",), (0,), None, 8, (other,)).validate()


def test_compare_without_frozen_classifiers_is_rejected(write_config: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", photo=True, data={"folder": str(tmp_path)})
    result = CliRunner().invoke(app, ["compare", str(config), "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert "the frozen classifiers could not be fitted: DataError" in result.stderr
