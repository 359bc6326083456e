"""Metrics of texts of a model: its own likelihood per token, and texts that it generates."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from concord.model.modality import CategoricalModality, TextModality, VectorModality
from concord.training import config
from concord.training.checkpoint import Run
from concord.training.data import dataset
from concord.training.evaluation import texts
from concord.training.evaluation.metrics.cider import CiderD
from concord.training.evaluation.metrics.texts import UNKNOWN_WORD, words
from concord.training.evaluation.texts import _nearest_score, _TrainingRows, evaluate_texts
from concord.training.fit import build, fit
from concord.training.progress import Progress

NOUNS, COLOURS = ("bird", "fish"), ("red", "blue", "green")


def write_classes(file: Path, rows: int, *, swapped: bool = False) -> None:
    """Write rows with a vector, two captions and the noun as a class; ``swapped``: the class is the other noun."""
    generator = np.random.default_rng(rows)
    noun, colour = generator.integers(0, 2, rows), generator.integers(0, 3, rows)
    vectors = np.eye(5)[noun] + np.eye(5)[2 + colour] + 0.05 * generator.standard_normal((rows, 5))
    words = [(NOUNS[n], COLOURS[c]) for n, c in zip(noun, colour, strict=True)]
    columns = {
        "vector": vectors.tolist(),
        "caption": [[f"this {n} is {c}", f"the {n} is {c}"] for n, c in words],
        "noun": [NOUNS[1 - n if swapped else n] if row % 9 else None for row, n in enumerate(noun)],
    }
    datasets.Dataset.from_dict(columns).to_parquet(file)


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
    write_classes(path / "classes-train.parquet", 400)
    write_classes(path / "classes-test.parquet", 70)
    write_classes(path / "swapped.parquet", 70, swapped=True)
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
    assert all(("sampled" in values) == (likelihood == "autoregressive") for values in found.values())
    assert evaluate_texts(model, train, test)["texts"]["caption"] == found


def test_autoregressive_captions_of_a_trained_model_read_and_follow_z(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert values["sampled"]["known_pairs"] > 0.9
        assert values["sampled"]["temperature"] == 0.3
    monkeypatch.setattr(texts, "SAMPLING_TEMPERATURE", 5.0)
    hot = evaluate_texts(model, train, test)["texts"]["caption"]
    for source, values in hot.items():
        assert values["sampled"]["known_pairs"] < 0.8
        assert values["known_pairs"] == found[source]["known_pairs"]
        assert values["sampled"]["distinct"] > values["distinct"]


def with_classes(settings: config.Config, test: str) -> config.Config:
    columns = {"vector": "vector", "caption": "caption", "noun": "noun"}
    source = config.Source(train="classes-train.parquet", test=test, columns=columns, licence="none")
    modalities = (*settings.modalities, CategoricalModality(name="noun"))
    return settings.model_copy(
        update={"modalities": modalities, "data": settings.data.model_copy(update={"sources": (source,)})}
    )


def test_evaluate_texts_compares_captions_with_references_nearest_rows_and_classes(folder: Path, tmp_path: Path) -> None:
    settings = with_classes(settings_of(folder, "autoregressive"), "classes-test.parquet")
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    model = fit(settings, train, Run(tmp_path, settings), Progress()).requires_grad_(False)
    found = evaluate_texts(model, train, test)["texts"]["caption"]
    of_photo, of_class, own = found["vector"], found["noun"], found["caption"]
    # All words that vary are right. Two of the four words are in all references, so they have no weight.
    assert of_photo["cider_nearest"] > 5
    assert of_photo["cider"] > 0.9 * of_photo["cider_nearest"]
    assert of_photo["of_mean"]["cider"] >= of_photo["cider"] - 0.2
    assert of_photo["cider_shuffled"] < 0.5 * of_photo["cider"], "the photo determines the text"
    assert of_class["cider"] < 0.8 * of_photo["cider"], "the class does not determine the colour"
    assert found["others"]["cider"] > 0.9 * of_photo["cider_nearest"]
    assert "cider" not in own, "the text is one of its references"
    assert not {"cider_nearest"} & (of_class.keys() | own.keys() | found["others"].keys())
    for values in (of_photo, of_class, own, of_photo["of_mean"]):
        assert values["classes"]["noun"]["rows"] == 62
        assert values["classes"]["noun"]["own_texts"] == 1
        assert min(values["classes"]["noun"][name] for name in ("accuracy", "agreement")) > 0.9

    swapped = dataset.load(with_classes(settings_of(folder, "autoregressive"), "swapped.parquet"), "test", training=train)
    other = evaluate_texts(model, train, swapped)["texts"]["caption"]["vector"]["classes"]["noun"]
    assert max(other["accuracy"], other["own_texts"]) < 0.1, "texts show the noun of the vector, not the class of the row"
    assert other["agreement"] > 0.9


def test_evaluate_texts_nearest_texts_are_of_the_training_row_with_the_most_similar_value(folder: Path) -> None:
    settings = with_classes(settings_of(folder, "autoregressive"), "classes-train.parquet")
    train = dataset.load(settings, "train")
    rows = _TrainingRows.read(train)
    caption = train.modalities[1]
    assert isinstance(caption, TextModality)
    vectors = next(train.batches(0, 400, 0, shuffle=False)).arrays["vector"]
    nearest = rows.nearest_texts("vector", vectors + 0.001, np.arange(3, 50), caption)
    assert nearest == [[words(caption, text) for text in own] for own in train.texts("caption")[3:50]]
    assert rows.nearest_texts("noun", vectors, np.arange(3), caption) is None
    assert rows.nearest_texts("vector", vectors[:1].repeat(50, 1), np.arange(50), caption) is None


def test_nearest_score_of_unknown_words_is_that_of_other_words() -> None:
    """The references have an unknown word, and so has the nearest row: they need not be the same word."""
    cider = CiderD([[(2, UNKNOWN_WORD, 3)], [(4, 5)]])
    assert _nearest_score(cider, [[(2, UNKNOWN_WORD, 3)], [(4, 5)]]) == _nearest_score(cider, [[(2, 9, 3)], [(4, 5)]])


def test_evaluate_texts_without_texts_is_empty(folder: Path) -> None:
    settings = settings_of(folder, "categorical")
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    vectors = tuple(VectorModality(name=name, size=2, mean=(0.0, 0.0), std=(1.0, 1.0)) for name in ("one", "other"))
    assert evaluate_texts(build(settings, vectors), train, test) == {}
