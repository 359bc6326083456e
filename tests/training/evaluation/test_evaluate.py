"""Metrics on the test split: complete, reproducible, and omitted if the rows do not allow them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from concord.model.modality import BinaryModality, CategoricalModality, VectorModality
from concord.model.vae.gaussian import kl, sample, standard_like
from concord.training import config, config_file
from concord.training.concord import Concord
from concord.training.data import dataset
from concord.training.evaluation.evaluate import _Rows, evaluate, evaluate_cross_modal, probed_subsets
from concord.training.evaluation.metrics.refinement import EVALUATION_SAMPLES
from concord.training.evaluation.metrics.retrieval import recall_at
from concord.training.fit import build
from concord.training.progress import Progress

NAMES = ["left", "right"]


def write(file: Path, labels: list[int | None], *, missing: int = 0) -> None:
    """Write rows of two vectors that separate the classes. The first ``missing`` rows have no second vector."""
    generator = torch.Generator().manual_seed(len(labels))
    vectors = [torch.randn(2, generator=generator) / 10 + (0.0 if label is None else 2.0 * label - 1) for label in labels]
    rows = {
        "first": [vector.tolist() for vector in vectors],
        "second": [None if i < missing else vector.tolist() for i, vector in enumerate(vectors)],
        "label": labels,
    }
    numbers = datasets.List(datasets.Value("float32"))
    features = datasets.Features({"first": numbers, "second": numbers, "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def loaded(
    folder: Path, *, label: str | None, names: tuple[str, str] = ("a", "b")
) -> tuple[config.Config, dataset.Dataset, dataset.Dataset]:
    """Return a configuration, and the rows of train.parquet and test.parquet."""
    source = config.Source(
        train="train.parquet",
        test="test.parquet",
        columns=dict(zip(names, ("first", "second"), strict=True)),
        label=label,
        licence="none",
    )
    vectors = tuple(VectorModality(name=name, size=2, mean=(0.0, 0.0), std=(1.0, 1.0)) for name in names)
    settings = config.Config(
        name="tiny",
        threads=1,
        modalities=vectors,
        data=config.Data(folder=folder, pairing="row", sources=(source,)),
        network=config.Network(latent=3, features=8, width=1, hidden=16),
        refiner=config.Refiner(steps=2, samples=2),
    )
    return settings, dataset.load(settings, "train"), dataset.load(settings, "test")


def metrics_of(
    folder: Path, *, label: str | None = "label", names: tuple[str, str] = ("a", "b"), **options: Any
) -> dict[str, Any]:
    """Return the metrics of an untrained model on the rows of train.parquet and test.parquet."""
    settings, train, test = loaded(folder, label=label, names=names)
    return evaluate(settings, build(settings, train.modalities), train, test, Progress(), **options)


def test_evaluate_gives_complete_reproducible_metrics(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10)
    metrics = metrics_of(tmp_path)
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["test_rows"] == 30
    assert list(metrics["probe"]) == ["a", "b", "a+b", "joint"]
    assert all(accuracy > 0.9 for accuracy in metrics["probe"].values())  # the classes are separable
    assert list(metrics["coverage"]) == ["a", "b"]
    assert all(0 <= shares["0.5"] < shares["0.9"] <= 1 for shares in metrics["coverage"].values())
    assert "linear" not in metrics
    assert "a" in metrics_of(tmp_path, baselines=True)["linear"]["retrieval"]
    refinement = metrics["refinement"]
    assert refinement["steps"] == 2
    assert len(refinement["elbo_by_step"]) == 1 + 2 + 2
    assert 0 <= refinement["raised_fresh_noise"] <= 1
    assert refinement["raised"] == 1  # small steps along the gradient of the same estimate
    assert refinement["rows"] == 30
    assert metrics_of(tmp_path) == metrics


def test_refined_rows_limits_refinement_to_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10)
    monkeypatch.setattr("concord.training.evaluation.evaluate.BATCH_ROWS", 10)
    metrics = metrics_of(tmp_path, refined_rows=20)
    assert (metrics["test_rows"], metrics["refinement"]["rows"]) == (30, 20)


def test_probe_of_modalities_named_like_a_figure_is_that_of_the_modalities(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10)
    expected = metrics_of(tmp_path)["probe"]
    named = metrics_of(tmp_path, names=("joint", "others"))["probe"]
    assert list(named.items()) == list(zip(("joint", "others", "joint+others", "the joint"), expected.values(), strict=True))


@pytest.mark.parametrize("unknown", [None, -1])
def test_probe_excludes_rows_without_label(tmp_path: Path, unknown: int | None) -> None:
    write(tmp_path / "train.parquet", [0, 1, unknown] * 20)
    write(tmp_path / "test.parquet", [0, 1, unknown] * 10)
    metrics = metrics_of(tmp_path)
    assert metrics["test_rows"] == 30
    assert metrics["probe"]["joint"] > 0.9


def test_probe_excludes_rows_without_any_modality_of_the_subset(tmp_path: Path) -> None:
    """Their embedding is that of no input."""
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1] * 15, missing=20)
    assert metrics_of(tmp_path)["probe"]["b"] > 0.9
    write(tmp_path / "test.parquet", [0, 1] * 15, missing=30)
    metrics = metrics_of(tmp_path)
    assert list(metrics["probe"]) == ["a", "a+b", "joint"]


@pytest.mark.parametrize("labels", [[1] * 30, [None] * 30])
def test_probe_is_omitted_without_two_classes(tmp_path: Path, labels: list[int | None]) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.parquet", labels)
    assert "probe" not in metrics_of(tmp_path)
    assert "probe" not in metrics_of(tmp_path, label=None)


def test_refinement_elbos_agree_with_an_estimate_of_many_samples(finished: Any) -> None:
    settings = config_file.read(finished.config)
    metrics = json.loads((finished.folder / "evaluation.json").read_text())["refinement"]
    test = dataset.load(settings, "test")
    vae = build(settings, test.modalities)
    assert isinstance(vae, Concord)
    vae.load_state_dict(torch.load(finished.folder / "checkpoint.pt")["model"])
    batch = next(test.batches(0, 30, 0, shuffle=False))
    noise = torch.randn(30, 400, vae.latent, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, encoder in (("elbo_before", vae.aligned), ("elbo_joint", vae.joint)):
            q = encoder(batch.arrays, batch.present)
            samples = vae.weighted_log_likelihood(batch.arrays, batch.present, sample(q, noise))
            expected = (samples.mean(1) - vae.beta * kl(q, standard_like(q))).mean().item()
            # Standard error of a mean over rows with EVALUATION_SAMPLES samples. Pairs count as one sample in the worst case.
            error = (samples.var(1) / (EVALUATION_SAMPLES / 2)).sum().sqrt().item() / 30
            assert error < 0.05 * abs(expected)
            assert abs(metrics[name] - expected) < 5 * error


def test_retrieval_uses_rows_with_both_modalities(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 10, missing=4)
    metrics = metrics_of(tmp_path, label=None)
    assert "probe" not in metrics
    for query, gallery in (("a", "b"), ("b", "a")):
        recalls = metrics["retrieval"][query][gallery]
        assert recalls["rows"] == 26
        assert 0 <= recalls["recall@1"] <= recalls["recall@5"] <= recalls["recall@10"] <= 1
    assert "attributes" not in metrics


def test_retrieval_of_a_large_split_runs_only_the_batches_of_its_first_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 30)
    write(tmp_path / "test.parquet", [0, 1, 1] * 20, missing=4)
    monkeypatch.setattr("concord.training.evaluation.evaluate.BATCH_ROWS", 8)
    monkeypatch.setattr("concord.training.evaluation.cross_modal.RETRIEVAL_ROWS", 10)
    monkeypatch.setattr("concord.training.evaluation.cross_modal.PREDICTED_ROWS", 10)
    original, rows = Concord.posteriors, []

    def counting(model: Concord, arrays: Any, masks: Any) -> Any:
        rows.append(len(masks[0]))
        return original(model, arrays, masks)

    settings, _, test = loaded(tmp_path, label=None)
    model = build(settings, test.modalities).eval()
    (batch,) = test.batches(0, 60, 0, shuffle=False)
    with torch.no_grad():
        masks = [batch.present & torch.tensor(mask) for mask in ((True, False), (False, True))]
        one, other = (posterior.mean[4:14].numpy() for posterior in model.posteriors(batch.arrays, masks))
    monkeypatch.setattr(Concord, "posteriors", counting)
    retrieval = evaluate_cross_modal(model, test)["retrieval"]
    assert rows == [8, 8]
    for query, gallery, expected in (("a", "b", recall_at(one, other)), ("b", "a", recall_at(other, one))):
        assert retrieval[query][gallery].pop("median_rank") >= 1
        assert retrieval[query][gallery] == {"rows": 10, **{f"recall@{k}": recall for k, recall in expected.items()}}


def test_metrics_do_not_depend_on_the_size_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", [0, 1, None] * 20)
    write(tmp_path / "test.parquet", [0, 1, None] * 10, missing=7)
    whole = metrics_of(tmp_path)
    monkeypatch.setattr("concord.training.evaluation.evaluate.BATCH_ROWS", 7)
    parts = metrics_of(tmp_path)
    for name in ("probe", "retrieval", "test_rows"):
        assert parts[name] == whole[name]
    assert parts["refinement"]["rows"] == 30
    assert parts["refinement"]["elbo_joint"] == pytest.approx(whole["refinement"]["elbo_joint"], rel=0.1)


def test_results_of_many_batches_are_in_memory_that_is_allocated_once() -> None:
    rows, parts = _Rows(10), [torch.rand(size, 3) for size in (4, 0, 4, 1)]
    assert rows.all().numel() == 0
    addresses = set()
    for part in parts:
        rows.add(part)
        addresses.add(rows.all().data_ptr())
    assert len(addresses) == 1
    assert torch.equal(rows.all(), torch.cat(parts))


@pytest.mark.parametrize(("word", "others"), [("word", "others"), ("others", "the others")])
def test_attributes_are_predicted_from_other_modalities(tmp_path: Path, word: str, others: str) -> None:
    rows = {
        "traits": [[row % 2, 1] if row else None for row in range(40)],
        "number": [[float(row % 2)] if row % 5 else None for row in range(40)],
        "word": ["yes" if row % 2 else "no" for row in range(40)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    modalities = (
        BinaryModality(name="traits", attributes=("odd", "all")),
        VectorModality(name="number", size=1),
        CategoricalModality(name=word),
    )
    source = config.Source(
        train="rows.parquet",
        test="rows.parquet",
        columns={"traits": "traits", "number": "number", word: "word"},
        licence="none",
    )
    settings = config.Config(
        name="tiny", threads=1, modalities=modalities, data=config.Data(folder=tmp_path, pairing="row", sources=(source,))
    )
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    vae = build(settings, train.modalities).eval()
    by_source = evaluate_cross_modal(vae, test)["attributes"]["traits"]
    assert {source: metrics["rows"] for source, metrics in by_source.items()} == {"number": 32, word: 39, others: 39}
    assert by_source[word]["chance"] == pytest.approx(20 / 39)
    assert by_source[word]["map"] in (
        pytest.approx(1.0),
        pytest.approx(20 / 39, abs=0.2),
    )  # the word has two embeddings, in the right order or in the wrong one


def test_probed_subsets_of_many_modalities_are_single_all_but_one_and_all() -> None:
    assert len(probed_subsets(list("abcd"))) == 15
    sizes = [name.count("+") + 1 for name in probed_subsets(list("abcdefgh"))]
    assert sizes == [1] * 8 + [7] * 8 + [8]
