"""Metrics of texts of a model: its own likelihood per token, and texts that it generates."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from concord.model.modality import TextModality, VectorModality
from concord.training import config
from concord.training.checkpoint import Run
from concord.training.data import dataset
from concord.training.evaluation.texts import evaluate_texts
from concord.training.fit import build, fit
from concord.training.progress import Progress

NOUNS, COLOURS = ("bird", "fish"), ("red", "blue", "green")


def write(file: Path, rows: int) -> None:
    """Write rows whose vector names the words of their caption. Some have no vector, others no caption."""
    generator = np.random.default_rng(rows)
    noun, colour = generator.integers(0, 2, rows), generator.integers(0, 3, rows)
    vectors = np.eye(5)[noun] + np.eye(5)[2 + colour]
    captions = [f"this {NOUNS[n]} is {COLOURS[c]}" for n, c in zip(noun, colour, strict=True)]
    columns = {
        "vector": [None if row % 7 == 3 else vectors[row].tolist() for row in range(rows)],
        "caption": [None if row % 5 == 4 and row % 7 != 3 else captions[row] for row in range(rows)],
    }
    numbers = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"vector": numbers, "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions")
    write(path / "train.parquet", 400)
    write(path / "test.parquet", 70)
    return path


def settings_of(folder: Path, likelihood: Any) -> config.Config:
    columns = {"vector": "vector", "caption": "caption"}
    source = config.Source(train="train.parquet", test="test.parquet", columns=columns, licence="none")
    stage = {"epochs": 12, "batch_size": 40, "learning_rate": 3e-3}
    return config.Config(
        name="tiny",
        threads=1,
        modalities=(
            VectorModality(name="vector", size=5),
            TextModality(name="caption", length=6, unit="word", likelihood=likelihood),
        ),
        data=config.Data(folder=folder, pairing="row", sources=(source,)),
        network=config.Network(latent=4, features=16, width=1, hidden=32),
        joint=config.Joint(**stage),
        refiner=config.Refiner(**{**stage, "epochs": 1}, steps=0),
        align=config.Align(**stage, reconstruction=1.0),
    )


@pytest.mark.parametrize("likelihood", ["categorical", "shifted", "autoregressive"])
def test_evaluate_texts_of_an_untrained_model_has_all_metrics(folder: Path, likelihood: str) -> None:
    settings = settings_of(folder, likelihood)
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    model = build(settings, train.modalities).eval().requires_grad_(False)
    found = evaluate_texts(model, train, test)["texts"]["caption"]
    assert found.keys() == {"vector", "caption"}
    assert (found["vector"]["rows"], found["vector"]["predicted_rows"]) == (60, 48)
    assert (found["caption"]["rows"], found["caption"]["predicted_rows"]) == (58, 58)
    assert all(0 <= values[name] <= 1 for values in found.values() for name in ("distinct", "known_pairs", "repeats"))
    assert all(values["nats"] > 0 for values in found.values())
    assert evaluate_texts(model, train, test)["texts"]["caption"] == found


def test_autoregressive_captions_of_a_trained_model_read_and_follow_z(folder: Path, tmp_path: Path) -> None:
    settings = settings_of(folder, "autoregressive")
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    model = fit(settings, train, Run(tmp_path, settings), Progress()).requires_grad_(False)
    found = evaluate_texts(model, train, test)["texts"]["caption"]
    for source in ("vector", "caption"):
        values = found[source]
        assert values["known_pairs"] > 0.97
        assert values["repeats"] == 0
        assert values["tokens"] == pytest.approx(4, abs=0.2)
        # Two of the five tokens vary, by log 2 and log 3 nats.
        assert values["nats_shuffled"] - values["nats"] > 0.3
        assert values["nats"] < 0.2


def test_evaluate_texts_without_texts_is_empty(folder: Path) -> None:
    settings = settings_of(folder, "categorical")
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    vectors = tuple(VectorModality(name=name, size=2, mean=(0.0, 0.0), std=(1.0, 1.0)) for name in ("one", "other"))
    assert evaluate_texts(build(settings, vectors), train, test) == {}
