"""Figures of requests by the number of refinement steps, against the service's refinement of one row at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from concord.model.modality import BinaryModality, CategoricalModality, VectorModality
from concord.model.vae.gaussian import Gaussian, antithetic, refinement_anchor, sample
from concord.service.inference.jobs import RefinementLimits
from concord.service.inference.refinement import RefinementState
from concord.training import config
from concord.training.concord import Concord
from concord.training.data import dataset
from concord.training.data.dataset import Batch
from concord.training.evaluation import requests
from concord.training.evaluation.metrics.attributes import mean_average_precision
from concord.training.evaluation.metrics.numbers import r2
from concord.training.evaluation.metrics.retrieval import recall_at
from concord.training.evaluation.requests import STEPS, evaluate_requests, recommend, request_scores
from concord.training.fit import build
from concord.training.progress import Progress

ROWS = 120
QUIET = Progress(quiet=True)
LOUD_NOISE = np.random.default_rng(0).normal(size=(10, 5))


def tiny(folder: Path, count: int = ROWS, **changes: Any) -> tuple[config.Config, dataset.Dataset, Concord]:
    """Return a configuration, rows with absent values, and an untrained model whose refiner takes large steps."""
    generator = np.random.default_rng(3)
    kinds = generator.integers(0, 2, count)
    rows = {
        "traits": [[kind, int(generator.integers(0, 2))] if row % 7 else None for row, kind in enumerate(kinds.tolist())],
        "number": [[float(kind + generator.normal() / 4)] for kind in kinds],
        "place": [generator.normal(size=2).tolist() if row % 5 else None for row in range(count)],
        "word": ["yes" if kind else "no" for kind in kinds],
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    modalities = (
        BinaryModality(name="traits", attributes=("first", "second")),
        VectorModality(name="number", size=1),
        VectorModality(name="place", size=2),
        CategoricalModality(name="word"),
    )
    source = config.Source(
        train="rows.parquet", test="rows.parquet", columns={m.name: m.name for m in modalities}, licence="none"
    )
    settings = config.Config(
        name="tiny",
        threads=1,
        modalities=modalities,
        data=config.Data(folder=folder, pairing="row", sources=(source,)),
        network=config.Network(latent=3, features=8, width=1, hidden=16),
        refiner=config.Refiner(serving_samples=2),
        **changes,
    )
    data = dataset.load(settings, "test")
    model = build(settings, data.modalities).eval().requires_grad_(False)
    assert isinstance(model, Concord)
    model.refiner.rates[-1].bias.fill_(3.0)
    return settings, data, model


def refined_by_the_service(model: Concord, row: Batch, start: Gaussian, noise: torch.Tensor, steps: int) -> Gaussian:
    """Refine one row with ``RefinementState``, as the scheduler does."""
    complete = bool(row.present.all())
    anchor = refinement_anchor(start, row.present)
    state = RefinementState(RefinementLimits(steps=steps), torch.cat(start, 1)[0].numpy(), complete=complete, now=0.0)
    posterior, more = start, True
    while more:
        posterior, objective = model.refine_step(row.arrays, row.present, posterior, anchor, noise)
        following = torch.cat(posterior, 1)[0].numpy()
        more = state.advance(objective.item(), following, finite=bool(np.isfinite(following).all()), now=0.0)
    mean, log_var = torch.from_numpy(state.best).unsqueeze(0).chunk(2, dim=1)
    return Gaussian(mean, log_var)


def test_figures_are_those_of_requests_that_the_service_refines_one_by_one(tmp_path: Path) -> None:
    count = 24
    settings, data, model = tiny(tmp_path, count)
    found = evaluate_requests(settings, model, data, data, {}, QUIET)
    assert found.keys() == {"requests"}  # without held-out rows there is no recommendation
    assert found["requests"]["steps"] == list(STEPS)
    assert found["requests"]["rows"] == count
    (batch,) = data.batches(0, count, 0, shuffle=False)
    names = [m.name for m in model.modalities]
    generator = torch.Generator().manual_seed(settings.seed)
    random = torch.rand(batch.present.shape, generator=generator)
    by_name = {
        name: model.aligned(batch.arrays, batch.present & torch.tensor([n == name for n in names])).mean for name in names
    }
    changed = 0
    for size in (1, 2, 3):
        lacking = torch.zeros_like(batch.present)
        for number, has in enumerate(batch.present):
            own = sorted(has.nonzero().flatten().tolist(), key=lambda m: random[number, m].item())
            lacking[number, own[size:]] = True
        rows = lacking.any(1).nonzero().flatten().tolist()
        of_steps = antithetic(torch.randn(len(rows), 1, 3, generator=generator))
        of_samples = torch.randn(len(rows), requests.PREDICTION_SAMPLES, 3, generator=generator)
        figures = found["requests"]["present"][str(size)]
        for step, steps in ((0, 0), (2, 2), (4, 8)) if size != 2 else ():  # the others take a minute
            outcome: dict[str, list[Any]] = {name: [] for name in names}
            for index, number in enumerate(rows):
                row = batch.take(slice(number, number + 1))
                row = Batch(row.arrays, row.present & ~lacking[number], None)
                start = model.aligned(row.arrays, row.present)
                result = refined_by_the_service(model, row, start, of_steps[index : index + 1], steps)
                changed += steps > 0 and not torch.equal(result.mean, start.mean)
                z = sample(result, of_samples[index : index + 1])[0]
                nats = model.log_likelihoods(row.arrays, z[: requests.LIKELIHOOD_SAMPLES].unsqueeze(0))[0].mean(0)
                for m in lacking[number].nonzero().flatten().tolist():
                    decoded = model.decode(names[m], result.mean if names[m] == "word" else z).flatten(1).mean(0)
                    outcome[names[m]].append((number, result.mean[0], nats[m].item(), decoded.numpy()))
            for m, name in enumerate(names):
                numbers, means, nats, decoded = zip(*outcome[name], strict=True)
                truth, predicted = batch.arrays[name][list(numbers)].numpy(), np.stack(decoded)
                expected = {"log_likelihood": np.mean(nats)}
                if name in ("number", "place"):
                    expected["r2"] = r2(truth, predicted)
                    has = batch.present[:, m]
                    ranks = []
                    for number, mean in zip(numbers, means, strict=True):
                        similarity = torch.cosine_similarity(mean.double()[None], by_name[name].double())
                        ranks.append(int((similarity >= similarity[number])[has].sum()))
                    expected["recall@10"] = np.mean(np.array(ranks) <= 10)
                elif name == "traits":
                    expected["map"] = (mean_average_precision(truth, predicted) or (None,))[0]
                else:
                    expected["accuracy"] = np.mean(predicted.argmax(1) == truth[:, 0])
                measured = {kind: by_modality[name][step] for kind, by_modality in figures.items() if name in by_modality}
                assert measured == pytest.approx(expected, rel=1e-3, abs=1e-3), (size, steps, name)
    assert changed > 50  # refinement finds better posteriors than the start


def test_recall_of_a_row_equals_that_of_the_whole_gallery() -> None:
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(2, 50, 3))
    whole = requests.ranks(queries, gallery)
    assert np.array_equal(requests.ranks(queries[[7, 3]], gallery, np.array([7, 3])), whole[[7, 3]])
    assert recall_at(queries, gallery, (10,))[10] == np.mean(whole <= 10)


class AlwaysRight:
    """A classifier that finds the class of the row in some rows."""

    def __init__(self, shown: int) -> None:
        self.shown = shown

    def classify(self, values: torch.Tensor) -> torch.Tensor:
        return torch.full((len(values),), self.shown)


def test_coherence_is_the_share_of_generated_values_that_show_the_class_of_the_row(make_config: Any) -> None:
    settings = make_config(photo=True)
    data = dataset.load(settings, "test")
    model = build(settings, data.modalities)
    found = evaluate_requests(settings, model, data, data, {"digit": AlwaysRight(3), "word": AlwaysRight(-2)}, QUIET)
    assert found["requests"]["rows"] == 30
    for size, kinds in found["requests"]["present"].items():
        assert kinds.keys() == {"log_likelihood", "coherence"}, size  # the modalities of a row have a class in common, no more
        assert kinds["coherence"].keys() == {"digit", "word"}
        assert kinds["coherence"]["word"] == [0.0] * 5
        assert len(set(kinds["coherence"]["digit"])) == 1
        assert 0 <= kinds["coherence"]["digit"][0] < 0.5
    (batch,) = data.batches(0, 30, 0, shuffle=False)
    place = torch.rand(30, 3, generator=torch.Generator().manual_seed(settings.seed)).argsort(1).argsort(1)
    labels = batch.labels[place[:, 0] >= 1] == 3  # type: ignore[index]
    assert found["requests"]["present"]["1"]["coherence"]["digit"][0] == pytest.approx(labels.float().mean().item())


def test_requests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data, model = tiny(tmp_path)
    refined = []
    original = Concord.refine_step

    def counting(self: Concord, arrays: Any, present: torch.Tensor, *arguments: Any) -> Any:
        refined.append(len(present))
        return original(self, arrays, present, *arguments)

    monkeypatch.setattr(Concord, "refine_step", counting)
    monkeypatch.setattr(requests, "REQUESTS", 60)
    assert evaluate_requests(settings, model, data, data, {}, QUIET)["requests"]["rows"] == 20
    assert sum(refined) <= 60 * (1 + STEPS[-1])
    monkeypatch.setattr(requests, "REQUEST_ROWS", 15)
    assert evaluate_requests(settings, model, data, data, {}, QUIET)["requests"]["rows"] == 15


def test_steps_are_recommended_on_held_out_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data, model = tiny(tmp_path, validation=config.Validation(rows=55))
    measured = []
    original = requests._measure

    def recording(settings: Any, model: Any, data: Any, *arguments: Any) -> Any:
        measured.append(data._rows.tolist())
        return original(settings, model, data, *arguments)

    monkeypatch.setattr(requests, "_measure", recording)
    found = evaluate_requests(settings, model, data, data, {}, QUIET)
    assert measured == [list(range(ROWS)), data.hold_out(55)[1]._rows.tolist()]
    held_out = found["requests"]["held_out"]
    assert held_out["rows"] == 55
    assert found["recommended_steps"] in STEPS
    assert (held_out["scores"][0], held_out["errors"][0]) == (0.0, 0.0)
    assert all(error > 0 for error in held_out["errors"][1:])
    few, _, _ = tiny(tmp_path, validation=config.Validation(rows=40))
    assert "recommended_steps" not in evaluate_requests(few, model, data, data, {}, QUIET)
    shards = settings.model_copy(update={"data": settings.data.model_copy(update={"shards": True})})
    assert "recommended_steps" not in evaluate_requests(shards, model, data, data, {}, QUIET)


@pytest.mark.parametrize(
    ("scores", "noise", "expected"),
    [
        ([0.0, 0.1, 0.2, 0.3, 0.4], 0.0, 8),  # every step helps
        ([0.0, 0.1, 0.2, 0.2, 0.2], 0.0, 2),  # of equal ones, the smallest
        ([0.0, 0.1, 0.3, 0.2, 0.1], 0.0, 2),  # more steps overshoot
        ([0.0, -0.1, -0.2, -0.3, -0.4], 0.0, 0),  # no step helps
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.0, 0),
        ([0.0, 0.1, 0.2, 0.3, 0.4], 1.0, 0),  # nothing but noise
        ([0.0, 0.30, 0.31, 0.32, 0.33], 0.005, 1),  # more steps gain less than noise
    ],
)
def test_recommended_is_the_smallest_number_of_steps_that_none_beats_by_more_than_noise(
    scores: list[float], noise: float, expected: int
) -> None:
    assert recommend(np.array(scores), np.array(scores) + noise * LOUD_NOISE) == expected


def test_noise_that_all_steps_share_does_not_hide_a_gain() -> None:
    scores = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    assert recommend(scores, scores + LOUD_NOISE[:, :1]) == 8


def test_standard_errors_of_groups_of_one_row_are_those_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=30)
    left_out = np.array([np.delete(values, row).mean() for row in range(30)])
    assert requests._standard_errors(left_out[:, None])[0] == pytest.approx(values.std(ddof=1) / np.sqrt(30))


def test_score_is_the_mean_gain_of_kinds_and_counts_nats_in_standard_deviations() -> None:
    def figure(kind: str, *of_steps: Sequence[float]) -> Any:
        return requests._Figure(kind, np.arange(2), np.array(of_steps))

    figures = {
        (1, "log_likelihood", "a"): figure("log_likelihood", (-30, -10), (-25, -5)),  # 5 nats, half a standard deviation
        (1, "accuracy", "a"): figure("accuracy", (0, 0), (1, 0)),
        (1, "accuracy", "b"): figure("accuracy", (1, 1), (1, 1)),
        (2, "log_likelihood", "a"): figure("log_likelihood", (-3, -3), (-3, -3)),
    }
    assert requests._scores(figures, np.array([True, True])) == pytest.approx([0, (0.5 + 0.25 + 0.0) / 3])


def test_request_scores_are_means_over_modalities_and_none_for_earlier_versions() -> None:
    present = {"1": {"accuracy": {"a": [0.1, 0.3], "b": [0.3, 0.5]}}, "2": {"log_likelihood": {"a": [-2.0, -1.0]}}}
    assert request_scores({"requests": {"present": present}}) == {
        "accuracy of classes, from 1 modality": pytest.approx([0.2, 0.4]),
        "log-likelihood, nats, from 2 modalities": [-2.0, -1.0],
    }
    assert request_scores({"refinement": {}}) == {}
