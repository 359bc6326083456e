"""Export: provenance, card and content of a bundle, from the inputs that fit and evaluate keep in the run's folder."""

import io
import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from concord.model import bundle
from concord.model.bundle.manifest import Manifest
from concord.training import config_file, export, fit
from concord.training.checkpoint import Run
from concord.training.cli import app
from concord.training.data import dataset
from concord.training.errors import RunError
from concord.training.export import ExportInputs


@pytest.fixture(scope="module")
def manifest(finished: Any) -> Manifest:
    return bundle.read(finished.bundle).manifest


@pytest.fixture
def run_folder(finished: Any, tmp_path: Path) -> Path:
    """A copy of the finished run, without its bundle."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    shutil.rmtree(folder / "bundle")
    return folder


def export_command(finished: Any, folder: Path, *options: object) -> Any:
    return CliRunner().invoke(app, ["export", str(finished.config), "--out", str(folder), *map(str, options)])


def assert_same_content(path: Path, expected: Path) -> None:
    """All files are equal but the manifest, which has the time of the export."""
    assert {file.name for file in path.iterdir()} == {file.name for file in expected.iterdir()}
    for file in path.iterdir():
        if file.suffix == ".npz":
            with np.load(file) as arrays, np.load(expected / file.name) as expected_arrays:
                assert list(arrays) == list(expected_arrays)
                for name, array in arrays.items():
                    assert array.dtype == expected_arrays[name].dtype
                    assert np.array_equal(array, expected_arrays[name]), name
        elif file.name != "manifest.json":
            assert file.read_bytes() == (expected / file.name).read_bytes(), file.name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (path, expected)]
    for content in manifests:
        del content["provenance"]["created"]
        content["files"] = sorted(content["files"])
    assert manifests[0] == manifests[1]


def test_provenance_names_the_run(manifest: Manifest, finished: Any) -> None:
    settings, provenance = config_file.read(finished.config), manifest.provenance
    assert (manifest.name, manifest.version) == (settings.name, settings.version)
    assert provenance.config_sha256 == settings.sha256 == json.loads((finished.folder / "config.json").read_text())["sha256"]
    assert provenance.seed == settings.seed
    assert provenance.libraries.keys() >= {"python", "torch", "onnx", "onnxruntime", "numpy"}
    assert provenance.created.endswith("+00:00")
    assert manifest.refinement.horizon == settings.horizon
    assert manifest.refinement.samples == settings.refiner.serving_samples


def test_provenance_names_the_data(manifest: Manifest, digits_folder: Path) -> None:
    sources = {source.file: source for source in manifest.provenance.data}
    assert sources.keys() == {file.name for file in digits_folder.iterdir()}  # file names only, no paths of this machine
    assert {name: source.rows for name, source in sources.items() if "train" in name} == {
        "mnist-train.parquet": 60,
        "mnist-m-train.parquet": 60,
    }
    assert all(source.licence == "generated" and len(source.sha256) == 64 for source in sources.values())


def test_metrics_of_the_manifest_are_those_of_the_evaluation(manifest: Manifest, finished: Any) -> None:
    assert manifest.metrics == json.loads((finished.folder / "evaluation.json").read_text())


def test_card_has_the_provenance_and_metrics_of_the_manifest(manifest: Manifest, finished: Any) -> None:
    card = (finished.bundle / bundle.CARD).read_text()
    assert card.startswith("# tiny 1\n")
    assert "4-dimensional z over `digit` (image), `photo` (image), `word` (text)" in card
    for source in manifest.provenance.data:
        assert f"| {source.file} | {source.rows} | `{source.sha256[:16]}` | generated |" in card
    for name, accuracy in manifest.metrics["probe"].items():
        assert f"| {name} | {accuracy:.3f} |" in card
    assert f"goes from {manifest.metrics['refinement']['elbo_before']:.1f}" in card
    assert "## Limits" in card


def test_card_has_the_figures_of_requests_and_the_recommended_steps(manifest: Manifest, finished: Any) -> None:
    card = (finished.bundle / bundle.CARD).read_text()
    assert manifest.recommended_steps is None  # no rows were held out
    assert "Recommended" not in card
    by_step = np.mean(list(manifest.metrics["requests"]["present"]["1"]["coherence"].values()), axis=0)
    assert f"| coherence, from 1 modality | {' | '.join(f'{value:.3f}' for value in by_step)} |" in card
    figures = {**manifest.metrics, "recommended_steps": 4}
    figures["requests"] = {**figures["requests"], "held_out": {"rows": 70}}
    card = export.model_card(config_file.read(finished.config), manifest.provenance.data, figures)
    assert "\nRecommended: 4 steps, by 70 training rows that were held out.\n" in card
    del figures["requests"], figures["recommended_steps"]
    assert "from 1 modality" not in export.model_card(config_file.read(finished.config), manifest.provenance.data, figures)


def test_card_shows_the_sample_grid(finished: Any) -> None:
    content = bundle.read(finished.bundle).content("grid.png")
    assert content == (finished.folder / "grid.png").read_bytes()
    card = (finished.bundle / bundle.CARD).read_text()
    assert "One sample of the posterior of each subset, next to its inputs:\n\n![Samples and their inputs](grid.png)" in card


def test_card_without_labels_has_no_probe(manifest: Manifest, make_config: Any) -> None:
    figures = {name: value for name, value in manifest.metrics.items() if name != "probe"}
    card = export.model_card(make_config(), manifest.provenance.data, figures)
    assert "logistic regression" not in card
    assert "Refinement of complete rows" in card


def test_reference_embeddings_have_rows_of_several_classes(finished: Any) -> None:
    opened = bundle.read(finished.bundle)
    with np.load(io.BytesIO(opened.content(bundle.MAP)), allow_pickle=False) as reference_embeddings:
        assert reference_embeddings["mean"].shape == (len(reference_embeddings["label"]), opened.manifest.latent)
        assert np.isfinite(reference_embeddings["mean"]).all()
        assert len(set(reference_embeddings["label"].tolist())) > 1


def test_golden_examples_cover_every_subset(finished: Any) -> None:
    with np.load(finished.bundle / bundle.GOLDEN) as golden:
        subsets, counts = np.unique(golden["present"], axis=0, return_counts=True)
    assert len(subsets) == 7
    assert set(counts.tolist()) == {export.GOLDEN_REPEATS}


def test_export_inputs_are_those_of_the_data(finished: Any, run_folder: Path) -> None:
    settings = config_file.read(finished.config)
    run = Run(run_folder, settings)
    inputs = ExportInputs.read(run)
    assert inputs is not None
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    model = fit.load(settings, inputs.modalities, run)
    assert model is not None
    expected = ExportInputs.from_data(model.bundle_model(), train, test)
    assert inputs.modalities == expected.modalities == train.modalities
    assert inputs.sources == expected.sources == (*train.sources, *test.sources)
    for arrays, expected_arrays in (
        (inputs.examples, expected.examples),
        (inputs.reference_embeddings, expected.reference_embeddings),
    ):
        assert arrays.keys() == expected_arrays.keys()
        for name, array in arrays.items():
            assert array.dtype == expected_arrays[name].dtype
            assert np.array_equal(array, expected_arrays[name]), name
    rows = next(test.batches(0, 2 * 7, 0, shuffle=False))
    assert all(np.array_equal(array, rows.arrays[name].numpy()) for name, array in inputs.examples.items())


def test_export_works_without_the_data_and_prints_two_lines(
    finished: Any, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = export_command(finished, run_folder, "--data", tmp_path / "missing")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == ""
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert_same_content(run_folder / "bundle", finished.bundle)


def test_export_without_inputs_reads_the_data_and_says_so(finished: Any, run_folder: Path) -> None:
    """Folders of runs that version 0.1 evaluated have no export.npz."""
    (run_folder / "export.npz").unlink()
    result = export_command(finished, run_folder)
    assert result.exit_code == 0, result.output
    assert f"{run_folder / 'export.npz'}: does not exist. fit and evaluate write it since version 0.2" in result.stderr
    assert "Reading the data instead" in result.stderr
    assert_same_content(run_folder / "bundle", finished.bundle)


def test_export_without_inputs_and_data_names_both_remedies(finished: Any, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "export.npz").unlink()
    result = export_command(finished, run_folder, "--data", tmp_path / "missing")
    assert result.exit_code == 2
    error = result.stderr.partition("error: ")[2]
    assert error.startswith(f"{run_folder / 'export.npz'}: does not exist, and the data cannot be read instead (")
    assert "mnist-train.parquet" in error
    assert "Name the folder of the data with --data, or run evaluate where the data is" in error
    assert not (run_folder / "bundle").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"junk" * 99])
def test_damaged_export_inputs_are_rejected(finished: Any, run_folder: Path, damage: Any) -> None:
    file = run_folder / "export.npz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"export\.npz: damaged .*Run evaluate again"):
        ExportInputs.read(Run(run_folder, config_file.read(finished.config)))
    assert "Run evaluate again" in export_command(finished, run_folder).stderr


def test_code_revision_is_the_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        result = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, check=True, text=True)
        return result.stdout.strip()

    monkeypatch.setattr(export, "__file__", str(tmp_path / "export.py"))
    assert export.code_revision() == "unknown"
    (tmp_path / "export.py").write_text("old")
    git("init")
    git("add", "export.py")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert export.code_revision() == commit
    (tmp_path / "export.py").write_text("new")
    assert export.code_revision() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert export.code_revision() == "unknown"
