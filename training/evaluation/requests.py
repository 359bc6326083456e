"""What refinement steps do for requests, by the number of modalities that a request has, and how many steps to recommend."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from concord.model.modality import BinaryModality, CategoricalModality, VectorModality
from concord.model.vae.gaussian import Gaussian, antithetic, refinement_anchor
from concord.training.config import Config
from concord.training.data.dataset import Batch, Dataset
from concord.training.data.sources import UNKNOWN
from concord.training.evaluation.cross_modal import PREDICTION_SAMPLES, are_distinct, hashes
from concord.training.evaluation.metrics.attributes import mean_average_precision
from concord.training.evaluation.metrics.coherence import cross_coherence
from concord.training.evaluation.metrics.frozen_classifier import FrozenClassifier
from concord.training.evaluation.metrics.numbers import r2
from concord.training.evaluation.metrics.refinement import refinement
from concord.training.evaluation.metrics.retrieval import ranks
from concord.training.objectives import every_subset
from concord.training.posteriors import GaussianPosterior
from concord.training.progress import Progress
from concord.training.trainable import TrainableModel

STEPS = (0, 1, 2, 4, 8)
"""Numbers of steps that are measured, and among which one is recommended."""
REQUEST_ROWS, REQUESTS = 500, 2000
"""Rows that are measured, and requests from them, at most. With more than five modalities, the second is the lower limit."""
LIKELIHOOD_SAMPLES = 4
"""Samples of a posterior over which a log-likelihood is averaged."""
MIN_HELD_OUT = 50
"""Fewest held-out rows from which a number of steps is recommended."""
GROUPS = 10
"""Groups of rows of the jackknife."""
NOISE = 2.0
"""Standard errors within which two scores count as equal."""
TITLES = {
    "coherence": "coherence",
    "recall@10": "recall@10",
    "accuracy": "accuracy of classes",
    "map": "mean average precision of attributes",
    "r2": "R² of numbers",
    "log_likelihood": "log-likelihood, nats",
}
"""Kinds of figures, and what they are called in tables. Higher is better for all of them."""
_BATCH_ROWS = 250

Key = tuple[int, str, str]
"""Number of modalities of a request, kind of the figure, and the held-back modality that it is about."""


def evaluate_requests(
    config: Config,
    model: TrainableModel,
    train: Dataset,
    test: Dataset,
    classifiers: Mapping[str, FrozenClassifier],
    progress: Progress,
) -> dict[str, Any]:
    """Return what requests with some of the modalities get after 0, 1, 2, 4 and 8 refinement steps, and a recommendation.

    A request has k modalities of a row, chosen at random, for each k below the number of modalities that the row has. The other
    ones are held back. The posterior is that of the service, see ``metrics.refinement.refinement``. At most ``REQUEST_ROWS``
    rows with several modalities, chosen at random, and ``REQUESTS`` requests are measured, so the time is bounded.

    ``requests``: ``rows``, their number; ``steps``; and ``present``: {k: {kind: {held-back modality: [by number of steps]}}}.
    Kinds, all of them higher if better:

    - ``log_likelihood``: E_q[log p(x | z)] in nats, of the held-back value.
    - ``coherence``, with pairing by class: share of values, generated from one sample of the posterior, that show the class.
    - ``recall@10``, with pairing by row: retrieval of the held-back value by the posterior mean, among the posterior means of
      the values of all rows. Omitted for values that are not distinct.
    - ``accuracy`` of classes, ``map`` of attributes and ``r2`` of numbers, with pairing by row: predicted as in
      ``evaluate_cross_modal``.

    ``recommended_steps``: see ``recommend``. Measured in the same way on the rows that ``validation.rows`` holds out of
    training: test rows are not for choices, and on rows that the model was trained on, steps look different. Omitted with fewer
    than ``MIN_HELD_OUT`` of them, and with ``data.shards``, where they depend on the number of processes. ``requests.held_out``
    is the number of these rows, their ``scores`` and, as ``errors``, the standard errors of the scores.
    """
    rows, figures = _measure(config, model, test, classifiers, progress)
    if not figures:
        return {}
    found: dict[str, Any] = {"rows": rows, "steps": list(STEPS), "present": {}}
    for (count, kind, name), figure in figures.items():
        if (by_step := figure.by_step(np.ones(rows, dtype=bool))) is not None:
            found["present"].setdefault(str(count), {}).setdefault(kind, {})[name] = by_step.tolist()
    if not config.validation.rows or config.data.shards:
        return {"requests": found}
    rows, figures = _measure(config, model, train.hold_out(config.validation.rows)[1], classifiers, progress)
    if rows < MIN_HELD_OUT or not figures:
        return {"requests": found}
    groups = np.random.default_rng(0).permutation(rows) % GROUPS
    scores = _scores(figures, np.ones(rows, dtype=bool))
    left_out = np.stack([_scores(figures, groups != group) for group in range(GROUPS)])
    found["held_out"] = {"rows": rows, "scores": scores.tolist(), "errors": _standard_errors(left_out).tolist()}
    return {"requests": found, "recommended_steps": recommend(scores, left_out)}


def recommend(scores: Float[np.ndarray, " step"], left_out: Float[np.ndarray, "group step"]) -> int:
    """Return the smallest number of steps that no other number is better than by more than noise.

    Noise is ``NOISE`` standard errors of the difference of two scores of the same rows, by the delete-a-group jackknife. If no
    number of steps is better than none, this is 0.

    Args:
        scores: of each of ``STEPS``. Higher is better.
        left_out: the same scores without the rows of one group.
    """
    best = int(scores.argmax())
    is_equal = scores[best] - scores <= NOISE * _standard_errors(left_out - left_out[:, best : best + 1])
    return STEPS[int(is_equal.argmax())]


def request_scores(figures: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the figures of requests by title, for each of ``STEPS``: means over the held-back modalities.

    Args:
        figures: of ``evaluate``. Those of earlier versions, and of models that do not refine, have no figures of requests.
    """
    present = figures.get("requests", {}).get("present", {})
    return {
        f"{TITLES[kind]}, from {count} {'modality' if count == '1' else 'modalities'}": np.mean(
            list(by_modality.values()), axis=0
        ).tolist()
        for count, kinds in present.items()
        for kind, by_modality in kinds.items()
    }


def recommendation(figures: Mapping[str, Any]) -> str | None:
    """Return the recommended number of steps in a sentence. None: there is none.

    Args:
        figures: as ``request_scores``.
    """
    if (steps := figures.get("recommended_steps")) is None:
        return None
    rows = figures["requests"]["held_out"]["rows"]
    return f"Recommended: {steps} step{'' if steps == 1 else 's'}, by {rows:,} training rows that were held out."


@dataclass(frozen=True)
class _Figure:
    """One figure of all requests that lack a modality."""

    kind: str
    rows: Int64[np.ndarray, " request"]
    """Number of the row of each request."""
    values: Shaped[np.ndarray, "step request ..."]
    """Of each request: a hit or not, nats, probabilities or numbers."""
    truth: Float[np.ndarray, "request value"] | None = None
    """The held-back attributes or numbers. Other kinds need none."""

    def by_step(self, chosen: Bool[np.ndarray, " row"]) -> Float[np.ndarray, " step"] | None:
        """Return the metric over the requests of some rows, after each number of steps. None: it is not defined for them."""
        requests = chosen[self.rows]
        values = self.values[:, requests]
        if not values.shape[1]:
            return None
        if self.truth is None:
            return np.asarray(values.mean(1, dtype=np.float64))
        truth = self.truth[requests]
        if self.kind == "r2":
            found = [r2(truth, predicted) for predicted in values]
        else:
            precisions = [mean_average_precision(truth, predicted) for predicted in values]
            found = [None if precision is None else precision[0] for precision in precisions]
        return None if None in found else np.asarray(found, dtype=np.float64)

    def gains(self, chosen: Bool[np.ndarray, " row"]) -> Float[np.ndarray, " step"] | None:
        """Return ``by_step`` minus its value at step 0. Nats count in standard deviations over the requests at step 0."""
        if (by_step := self.by_step(chosen)) is None:
            return None
        scale = float(self.values[0].std(dtype=np.float64)) if self.kind == "log_likelihood" else 1.0
        return np.asarray((by_step - by_step[0]) / (scale or 1.0))


def _scores(figures: Mapping[Key, _Figure], chosen: Bool[np.ndarray, " row"]) -> Float[np.ndarray, " step"]:
    """Return the score of each number of steps: the mean gain over modalities, then over kinds and numbers of modalities."""
    by_kind: dict[tuple[int, str], list[np.ndarray]] = {}
    for (count, kind, _), figure in figures.items():
        if (gains := figure.gains(chosen)) is not None:
            by_kind.setdefault((count, kind), []).append(gains)
    return np.asarray(np.mean([np.mean(gains, axis=0) for gains in by_kind.values()], axis=0))


def _standard_errors(left_out: Float[np.ndarray, "group step"]) -> Float[np.ndarray, " step"]:
    """Return the standard errors of the delete-a-group jackknife."""
    return np.asarray(np.sqrt((len(left_out) - 1) * left_out.var(axis=0)))


def _measure(
    config: Config, model: TrainableModel, data: Dataset, classifiers: Mapping[str, FrozenClassifier], progress: Progress
) -> tuple[int, dict[Key, _Figure]]:
    """Return the number of rows that are measured, and the figures of their requests."""
    count = len(model.modalities)
    data = data.with_pairs().sample(min(REQUEST_ROWS, REQUESTS // (count - 1)))
    by_row = config.data.pairing == "row"
    generator = torch.Generator().manual_seed(config.seed)
    parts: dict[Key, list[tuple[np.ndarray, np.ndarray]]] = {}
    truth: dict[str, list[np.ndarray]] = {
        m.name: [] for m in model.modalities if isinstance(m, BinaryModality | VectorModality)
    }
    gallery = _Gallery(model)
    with progress.stage("requests", data.steps_per_epoch(_BATCH_ROWS, shuffle=False)) as advance, torch.no_grad():
        for step, batch in enumerate(data.batches(0, _BATCH_ROWS, 0, shuffle=False)):
            numbers = np.arange(len(batch)) + step * _BATCH_ROWS
            for name, values in truth.items():
                values.append(batch.arrays[name].cpu().numpy())
            if by_row:
                gallery.add(numbers, batch)
            place = torch.rand(batch.present.shape, generator=generator).masked_fill(~batch.present, 1.0).argsort(1).argsort(1)
            for size in range(1, count):
                lacking = batch.present & (place >= size)
                chosen = lacking.any(1)
                requests = _Requests(model, batch.take(chosen), lacking[chosen], classifiers, by_row)
                for kind, name, rows, of_steps in requests.refined(config.refiner.serving_samples, generator):
                    parts.setdefault((size, kind, name), []).append((numbers[chosen.cpu().numpy()][rows], of_steps))
            advance(step + 1, {})
    figures = {}
    for (size, kind, name), found in parts.items():
        rows, of_steps = np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found], axis=1)
        if kind == "recall@10":
            if (hits := gallery.hits(name, rows, of_steps)) is not None:
                figures[size, kind, name] = _Figure(kind, rows, hits)
        else:
            known = np.concatenate(truth[name])[rows] if kind in ("map", "r2") else None
            figures[size, kind, name] = _Figure(kind, rows, of_steps, known)
    return len(data), figures


@dataclass(frozen=True)
class _Requests:
    """Requests with some of the modalities of each row."""

    model: TrainableModel
    batch: Batch
    """With all modalities of the rows."""
    lacking: Bool[Tensor, "request modality"]
    """The modalities that are held back."""
    classifiers: Mapping[str, FrozenClassifier]
    by_row: bool
    """Whether the modalities of a row belong together, and not only its classes."""

    def refined(
        self, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[str, str, Bool[np.ndarray, " request"], Shaped[np.ndarray, "step chosen ..."]]]:
        """Yield kind, held-back modality, the requests that lack it, and their ``_Figure.values``; for recall, posterior means.

        Args:
            samples: of a refinement step in the service, an even number.
        """
        model, batch = self.model, self.batch
        if not len(batch):
            return
        given = Batch(batch.arrays, batch.present & ~self.lacking, batch.labels)
        (start,) = model.posteriors(given.arrays, [given.present])
        assert isinstance(start, GaussianPosterior)
        of_refinement = antithetic(torch.randn(len(batch), samples // 2, model.latent, generator=generator))
        noise = torch.randn(len(batch), PREDICTION_SAMPLES, model.latent, generator=generator)
        anchor = refinement_anchor(start.gaussian, given.present)
        results = refinement(model, given, start.gaussian, anchor, of_refinement, STEPS[-1])
        by_step = [list(self._results(posterior, noise)) for step, (posterior, _) in enumerate(results) if step in STEPS]
        for found in zip(*by_step, strict=True):
            kind, name, rows, _ = found[0]
            yield kind, name, rows.cpu().numpy(), np.stack([values.cpu().numpy() for *_, values in found])

    def _results(
        self, posterior: Gaussian, noise: Float[Tensor, "request sample latent"]
    ) -> Iterator[tuple[str, str, Bool[Tensor, " request"], Shaped[Tensor, "chosen ..."]]]:
        """Yield kind, held-back modality, the requests that lack it, and their values, of one posterior of each request."""
        model, batch = self.model, self.batch
        z = model.sample(posterior, noise)
        nats = model.log_likelihoods(batch.arrays, z[:, :LIKELIHOOD_SAMPLES], self.lacking).mean(1)
        for index, modality in enumerate(model.modalities):
            name, rows = modality.name, self.lacking[:, index]
            if not rows.any():
                continue
            yield "log_likelihood", name, rows, nats[rows, index]
            if self.by_row:
                yield "recall@10", name, rows, posterior.mean[rows]
                if isinstance(modality, CategoricalModality):
                    predicted = model.decode(name, posterior.mean[rows]).flatten(1).argmax(1)
                    yield "accuracy", name, rows, predicted == batch.arrays[name][rows, 0]
                elif isinstance(modality, BinaryModality | VectorModality):
                    decoded = model.decode(name, z[rows].flatten(0, 1)).view(-1, PREDICTION_SAMPLES, *modality.shape)
                    yield "map" if isinstance(modality, BinaryModality) else "r2", name, rows, decoded.mean(1)
            elif name in self.classifiers and batch.labels is not None:
                rows = rows & (batch.labels != UNKNOWN)
                yield "coherence", name, rows, cross_coherence(model, self.classifiers, name, z[rows, 0], batch.labels[rows])


class _Gallery:
    """The posterior means of single modalities of all rows, as a search has them."""

    def __init__(self, model: TrainableModel) -> None:
        self._model = model
        self._parts: dict[str, list[tuple[np.ndarray, ...]]] = {m.name: [] for m in model.modalities}

    def add(self, numbers: Int64[np.ndarray, " row"], batch: Batch) -> None:
        """Add the next rows."""
        names = list(self._parts)
        masks = [batch.present & single for single in every_subset(len(names))[: len(names)]]
        for name, mask, posterior in zip(names, masks, self._model.posteriors(batch.arrays, masks), strict=True):
            has = mask.any(1)
            arrays = (posterior.mean[has].cpu().numpy(), hashes(batch.arrays[name][has].cpu()).numpy())
            self._parts[name].append((numbers[has.cpu().numpy()], *arrays))

    def hits(
        self, name: str, rows: Int64[np.ndarray, " query"], queries: Float[np.ndarray, "step query latent"]
    ) -> Bool[np.ndarray, "step query"] | None:
        """Return whether each query finds its row's value of a modality among the first ten. None: few values are distinct."""
        numbers, means, values = (np.concatenate(part) for part in zip(*self._parts[name], strict=True))
        if not are_distinct(values):
            return None
        own = np.searchsorted(numbers, rows)
        return np.stack([ranks(of_step, means, own) <= 10 for of_step in queries])
