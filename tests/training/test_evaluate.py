"""Figures on the test split: complete, repeatable, and silent where rows cannot say."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from model.modality import BinaryModality, CategoricalModality, VectorModality
from model.vae.gaussian import kl, sample, standard_like
from model.vae.multimodal import MultimodalVAE
from training import config, config_file, data
from training.evaluate import across, evaluate, probed_subsets
from training.fit import build
from training.metrics.refinement import JUDGE_SAMPLES
from training.progress import Progress

NAMES = ["left", "right"]


def write(file: Path, labels: list[int | None], *, lacking: int = 0) -> None:
    """Rows of two vectors that tell their class; the first ``lacking`` rows have no second vector."""
    generator = torch.Generator().manual_seed(len(labels))
    signs = [torch.randn(2, generator=generator) / 10 + (0.0 if label is None else 2.0 * label - 1) for label in labels]
    rows = {
        "first": [sign.tolist() for sign in signs],
        "second": [None if i < lacking else sign.tolist() for i, sign in enumerate(signs)],
        "label": labels,
    }
    numbers = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"first": numbers, "second": numbers, "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def measured(folder: Path, *, label: str | None = "label", refined_rows: int | None = None) -> dict[str, Any]:
    """Figures of an untrained model on what was written."""
    source = config.Source(
        train="train.parquet", test="test.parquet", columns={"a": "first", "b": "second"}, label=label, licence="none"
    )
    vectors = tuple(VectorModality(name=name, size=2, mean=(0.0, 0.0), std=(1.0, 1.0)) for name in "ab")
    settings = config.Config(
        name="tiny",
        threads=1,
        modalities=vectors,
        data=config.Data(folder=folder, pairing="row", sources=(source,)),
        network=config.Network(latent=3, features=8, width=1, hidden=16),
        refiner=config.Refiner(steps=2, samples=2),
    )
    train, test = data.load(settings, "train"), data.load(settings, "test")
    return evaluate(settings, build(settings, train), train, test, Progress(), refined_rows=refined_rows)


def test_figures_are_complete(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10)
    figures = measured(tmp_path)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["test_rows"] == 30
    assert list(figures["probe"]) == ["a", "b", "a+b", "joint"]
    assert all(accuracy > 0.9 for accuracy in figures["probe"].values())  # the classes lie apart
    refinement = figures["refinement"]
    assert refinement["steps"] == 2
    assert len(refinement["elbo_by_step"]) == 1 + 2 + 2
    assert 0 <= refinement["raised_fresh_noise"] <= 1
    assert refinement["raised"] == 1  # small steps along the gradient of what they are judged by
    assert refinement["rows"] == 30
    assert measured(tmp_path) == figures


def test_refinement_can_be_told_of_the_first_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10)
    monkeypatch.setattr("training.evaluate.BATCH_ROWS", 10)
    told = measured(tmp_path, refined_rows=20)
    assert (told["test_rows"], told["refinement"]["rows"]) == (30, 20)


@pytest.mark.parametrize("unknown", [None, -1])
def test_rows_without_a_label_are_left_out_of_the_probe(tmp_path: Path, unknown: int | None) -> None:
    write(tmp_path / "train.parquet", [0, 1, unknown] * 20)
    write(tmp_path / "test.parquet", [0, 1, unknown] * 10)
    figures = measured(tmp_path)
    assert figures["test_rows"] == 30
    assert figures["probe"]["joint"] > 0.9


def test_rows_without_the_subset_are_left_out_of_its_probe(tmp_path: Path) -> None:
    """They could only be guessed."""
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1] * 15, lacking=20)
    assert measured(tmp_path)["probe"]["b"] > 0.9
    write(tmp_path / "test.parquet", [0, 1] * 15, lacking=30)
    figures = measured(tmp_path)
    assert list(figures["probe"]) == ["a", "a+b", "joint"]


@pytest.mark.parametrize("labels", [[1] * 30, [None] * 30])
def test_what_cannot_be_probed_is_not(tmp_path: Path, labels: list[int | None]) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", labels)
    assert "probe" not in measured(tmp_path)
    assert "probe" not in measured(tmp_path, label=None)


def test_elbos_are_those_of_the_whole_split(finished: Any) -> None:
    """Against many more samples, drawn otherwise."""
    settings = config_file.read(finished.config)
    figures = json.loads((finished.folder / "evaluation.json").read_text())["refinement"]
    test = data.load(settings, "test")
    vae: MultimodalVAE = build(settings, test)
    vae.load_state_dict(torch.load(finished.folder / "checkpoint.pt")["model"])
    batch = next(test.batches(0, 30, 0, shuffle=False))
    noise = torch.randn(30, 400, vae.latent, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, encoder in (("elbo_before", vae.aligned), ("elbo_joint", vae.joint)):
            q = encoder(batch.arrays, batch.present)
            samples = vae.evidences(batch.arrays, batch.present, sample(q, noise))
            expected = (samples.mean(1) - vae.beta * kl(q, standard_like(q))).mean().item()
            # Of a mean over rows of JUDGE_SAMPLES samples, which in pairs are worth half of them at worst.
            error = (samples.var(1) / (JUDGE_SAMPLES / 2)).sum().sqrt().item() / 30
            assert error < 0.05 * abs(expected)
            assert abs(figures[name] - expected) < 5 * error


def test_rows_that_are_pairs_are_retrieved(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10, lacking=4)
    figures = measured(tmp_path, label=None)
    assert "probe" not in figures
    for query, gallery in (("a", "b"), ("b", "a")):
        found = figures["retrieval"][query][gallery]
        assert found["rows"] == 26
        assert 0 <= found["recall@1"] <= found["recall@5"] <= found["recall@10"] <= 1
    assert "attributes" not in figures


def test_attributes_are_told_from_other_modalities(tmp_path: Path) -> None:
    rows = {
        "traits": [[row % 2, 1] if row else None for row in range(40)],
        "number": [[float(row % 2)] if row % 5 else None for row in range(40)],
        "word": ["yes" if row % 2 else "no" for row in range(40)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    modalities = (
        BinaryModality(name="traits", attributes=("odd", "all")),
        VectorModality(name="number", size=1),
        CategoricalModality(name="word"),
    )
    source = config.Source(
        train="rows.parquet",
        test="rows.parquet",
        columns={"traits": "traits", "number": "number", "word": "word"},
        licence="none",
    )
    settings = config.Config(
        name="tiny", threads=1, modalities=modalities, data=config.Data(folder=tmp_path, pairing="row", sources=(source,))
    )
    train, test = data.load(settings, "train"), data.load(settings, "test")
    vae = build(settings, train).eval()
    found = across(vae, test)["attributes"]["traits"]
    assert {name: figures["rows"] for name, figures in found.items()} == {"number": 32, "word": 39, "others": 39}
    assert found["word"]["chance"] == pytest.approx(20 / 39)
    assert found["word"]["map"] in (
        pytest.approx(1.0),
        pytest.approx(20 / 39, abs=0.2),
    )  # two embeddings, in one order or the other


def test_many_modalities_are_probed_alone_all_but_one_and_all() -> None:
    assert len(probed_subsets(list("abcd"))) == 15
    sizes = [name.count("+") + 1 for name in probed_subsets(list("abcdefgh"))]
    assert sizes == [1] * 8 + [7] * 8 + [8]
