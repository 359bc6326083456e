"""A run's bundle says where it comes from and how well it does, to programs and to people."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import bundle
from model.manifest import Manifest
from training import config_file, export


@pytest.fixture(scope="module")
def manifest(finished: Any) -> Manifest:
    return bundle.read(finished.bundle).manifest


def test_the_provenance_names_the_run(manifest: Manifest, finished: Any) -> None:
    settings, provenance = config_file.read(finished.config), manifest.provenance
    assert (manifest.name, manifest.version) == (settings.name, settings.version)
    assert provenance.config_sha256 == settings.sha256 == json.loads((finished.folder / "config.json").read_text())["sha256"]
    assert provenance.seed == settings.seed
    assert provenance.libraries.keys() >= {"python", "torch", "onnx", "onnxruntime", "numpy"}
    assert provenance.created.endswith("+00:00")
    assert manifest.refinement.horizon == settings.horizon
    assert manifest.refinement.samples == settings.refiner.serving_samples


def test_the_provenance_names_the_data(manifest: Manifest, digits_folder: Path) -> None:
    told = {source.file: source for source in manifest.provenance.data}
    assert told.keys() == {file.name for file in digits_folder.iterdir()}  # names alone, no path of this machine
    assert {name: source.rows for name, source in told.items() if "train" in name} == {
        "mnist-train.parquet": 60,
        "mnist-m-train.parquet": 60,
    }
    assert all(source.licence == "drawn" and len(source.sha256) == 64 for source in told.values())


def test_the_metrics_are_those_of_the_evaluation(manifest: Manifest, finished: Any) -> None:
    assert manifest.metrics == json.loads((finished.folder / "evaluation.json").read_text())


def test_the_card_tells_people_the_same(manifest: Manifest, finished: Any) -> None:
    card = (finished.bundle / bundle.CARD).read_text()
    assert card.startswith("# tiny 1\n")
    assert "4-dimensional z over `digit` (image), `photo` (image), `word` (text)" in card
    for source in manifest.provenance.data:
        assert f"| {source.file} | {source.rows} | `{source.sha256[:16]}` | drawn |" in card
    for name, accuracy in manifest.metrics["probe"].items():
        assert f"| {name} | {accuracy:.3f} |" in card
    assert f"goes from {manifest.metrics['refinement']['elbo_before']:.1f}" in card
    assert "## Limits" in card


def test_the_card_shows_what_is_generated(finished: Any) -> None:
    found = bundle.read(finished.bundle)
    assert found.content("grid.png") == (finished.folder / "grid.png").read_bytes()
    assert "](grid.png)" in (finished.bundle / bundle.CARD).read_text()


def test_the_map_has_rows_of_every_class(finished: Any) -> None:
    found = bundle.read(finished.bundle)
    with np.load(io.BytesIO(found.content(bundle.MAP)), allow_pickle=False) as landmarks:
        assert landmarks["mean"].shape == (len(landmarks["label"]), found.manifest.latent)
        assert np.isfinite(landmarks["mean"]).all()
        assert len(set(landmarks["label"].tolist())) > 1


def test_a_card_without_labels_has_no_probe(manifest: Manifest, make_config: Any) -> None:
    figures = {name: value for name, value in manifest.metrics.items() if name != "probe"}
    card = export.model_card(make_config(), manifest.provenance.data, figures)
    assert "logistic regression" not in card
    assert "Refinement of complete rows" in card


def test_every_subset_is_among_the_golden_examples(finished: Any) -> None:
    with np.load(finished.bundle / bundle.GOLDEN) as golden:
        subsets, counts = np.unique(golden["present"], axis=0, return_counts=True)
    assert len(subsets) == 7
    assert set(counts.tolist()) == {export.GOLDEN_ROUNDS}


def test_the_revision_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, check=True, text=True)
        return done.stdout.strip()

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
