"""Retrieval and prediction between the modalities of a row, by a model and by the linear baselines."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from concord.model.modality import BinaryModality, CategoricalModality, VectorModality
from concord.training import config
from concord.training.data import dataset
from concord.training.evaluation.cross_modal import CrossModalRows
from concord.training.evaluation.linear import evaluate_linear
from concord.training.evaluation.metrics.numbers import r2
from concord.training.progress import Progress

ROWS = 40
NUMBER = VectorModality(name="number", size=2)
KIND = CategoricalModality(name="kind", classes=("a", "b", "c", "d"))
TRAITS = BinaryModality(name="traits", attributes=("odd", "low"))
KINDS = np.arange(ROWS)[:, None] % 4
VALUES = {
    "number": np.stack([np.arange(ROWS), np.arange(ROWS) ** 2], axis=1).astype(np.float32),
    "kind": KINDS,
    "traits": np.concatenate([KINDS % 2, KINDS < 2], axis=1).astype(np.float32),
}


@pytest.fixture
def rows() -> CrossModalRows:
    present = np.ones((ROWS, 3), dtype=bool)
    present[:10, 0] = False
    present[10:14, 2] = False
    return CrossModalRows((NUMBER, KIND, TRAITS), VALUES, present)


def test_retrieval_omits_galleries_with_few_distinct_values(rows: CrossModalRows) -> None:
    embeddings = np.random.default_rng(0).normal(size=(ROWS, 8))
    metrics = rows.retrieval(lambda *_: (embeddings, embeddings))
    assert {query: list(galleries) for query, galleries in metrics.items()} == {
        "kind": ["number"],
        "traits": ["number"],
        "others": ["number"],
    }
    assert metrics["kind"]["number"] == {"rows": 30, "recall@1": 1, "recall@5": 1, "recall@10": 1, "median_rank": 1}
    assert metrics["traits"]["number"]["rows"] == 26


def test_median_rank_of_independent_embeddings_is_half_of_the_gallery(rows: CrossModalRows) -> None:
    one, other = np.random.default_rng(0).normal(size=(2, ROWS, 8))
    metrics = rows.retrieval(lambda *_: (one, other))
    assert metrics["kind"]["number"]["median_rank"] == pytest.approx(15, abs=6)


def test_exact_predictions_have_perfect_scores(rows: CrossModalRows) -> None:
    truth = {**VALUES, "kind": np.eye(4)[KINDS[:, 0]]}
    metrics = rows.predictions(lambda target, _, chosen: truth[target][chosen])
    by_source = metrics["classes"]["kind"]
    assert list(by_source) == ["number", "traits", "others"]
    certain = {"log_loss": 0, "calibration_error": 0}
    assert by_source["number"] == {"rows": 30, "accuracy": 1, "majority": pytest.approx(8 / 30), **certain}
    assert metrics["numbers"]["number"]["kind"] == {"rows": 30, "r2": 1}
    of_traits = metrics["attributes"]["traits"]["number"]
    assert of_traits.items() >= {"map": 1, **certain}.items()
    assert metrics["attributes"]["traits"]["others"]["rows"] == 36


def test_predictions_that_a_method_cannot_make_are_omitted(rows: CrossModalRows) -> None:
    metrics = rows.predictions(lambda *_: None)
    assert metrics == {"attributes": {}, "classes": {}, "numbers": {}}


def test_r2_is_zero_for_the_mean_and_ignores_constant_values() -> None:
    truth = np.array([[1.0, 5.0], [3.0, 5.0]])
    assert r2(truth, np.full((2, 2), 2.0)) == 0
    assert r2(truth, truth + 1) == 0
    assert r2(truth, truth) == 1
    assert r2(truth[:, 1:], truth[:, 1:]) is None


def load(folder: Path, columns: dict[str, list[Any]]) -> tuple[dataset.Dataset, dataset.Dataset]:
    columns["split"] = ["test" if row % 4 == 0 else "train" for row in range(len(columns["number"]))]
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    names = {name: name for name in ("number", "other", "kind", "traits")}
    source = config.Source(train="rows.parquet", split="split", columns=names, licence="none")
    modalities = (
        VectorModality(name="number", size=3),
        VectorModality(name="other", size=3),
        CategoricalModality(name="kind"),
        BinaryModality(name="traits", attributes=("high", "low")),
    )
    data = config.Data(folder=folder, pairing="row", sources=(source,))
    settings = config.Config(name="linear", threads=1, modalities=modalities, data=data)
    return dataset.load(settings, "train"), dataset.load(settings, "test")


def columns(count: int, *, aligned: bool) -> dict[str, list[Any]]:
    generator = np.random.default_rng(0)
    number, rotation = generator.normal(size=(count, 3)), np.linalg.qr(generator.normal(size=(3, 3)))[0]
    source = number if aligned else generator.normal(size=(count, 3))
    high = source[:, 0] > 0
    return {
        "number": number.tolist(),
        "other": [row if index % 5 else None for index, row in enumerate((source @ rotation).tolist())],
        "kind": np.where(high, "high", "low").tolist(),
        "traits": np.stack([high, ~high], axis=1).astype(int).tolist(),
    }


def test_linear_baselines_solve_linear_relations(tmp_path: Path) -> None:
    metrics = evaluate_linear(*load(tmp_path, columns(400, aligned=True)), 8, Progress(quiet=True))
    assert metrics["retrieval"]["number"]["other"]["recall@1"] > 0.9
    assert metrics["numbers"]["other"]["number"]["r2"] > 0.99
    assert metrics["classes"]["kind"]["number"]["accuracy"] > 0.9
    assert metrics["attributes"]["traits"]["others"]["map"] > 0.95
    assert set(metrics["retrieval"]["number"]) == {"other"}, "classes and attributes have few distinct values"


def test_linear_baselines_of_independent_modalities_are_at_the_chance_level(tmp_path: Path) -> None:
    metrics = evaluate_linear(*load(tmp_path, columns(400, aligned=False)), 8, Progress(quiet=True))
    assert metrics["retrieval"]["number"]["other"]["recall@10"] == pytest.approx(10 / 80, abs=0.1)
    assert metrics["numbers"]["other"]["number"]["r2"] == pytest.approx(0, abs=0.1)
    assert metrics["classes"]["kind"]["number"]["accuracy"] == pytest.approx(0.5, abs=0.15)


def test_linear_baselines_without_rows_of_a_pair_are_omitted(tmp_path: Path) -> None:
    rows = columns(40, aligned=True)
    rows["other"] = [row if index % 4 == 0 else None for index, row in enumerate(rows["other"])]  # test rows only
    rows["other"][1] = [0.0, 0.0, 0.0]
    metrics = evaluate_linear(*load(tmp_path, rows), 8, Progress(quiet=True))
    assert "other" not in metrics["numbers"]
    assert "kind" in metrics["classes"]
