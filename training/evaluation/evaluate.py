"""Metrics of a trained model on the test split: probes, retrieval, attributes and the gain of refinement."""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, VectorModality
from concord.model.vae.gaussian import antithetic, standard_like
from concord.training.config import Config
from concord.training.data.dataset import Dataset
from concord.training.data.sources import UNKNOWN
from concord.training.evaluation.cross_modal import PREDICTION_SAMPLES, CrossModalRows, hashes, rows_needed
from concord.training.evaluation.linear import evaluate_linear
from concord.training.evaluation.metrics.calibration import LEVELS, coverage
from concord.training.evaluation.metrics.frozen_classifier import FrozenClassifier
from concord.training.evaluation.metrics.probe import linear_probe
from concord.training.evaluation.metrics.refinement import EVALUATION_SAMPLES, refined_elbos
from concord.training.evaluation.pictures import evaluate_pictures, picture_network
from concord.training.evaluation.requests import evaluate_requests
from concord.training.evaluation.texts import evaluate_texts
from concord.training.objectives import every_subset, figure_name, named_subsets
from concord.training.posteriors import GaussianPosterior
from concord.training.progress import Progress
from concord.training.trainable import TrainableModel

BATCH_ROWS = 500
PROBE_POOL = 6000
"""Training rows from which the points of the probe are selected."""
PROBE_POINTS, POINTS_PER_CLASS = 500, 10
"""Points of the probe: the larger of a number, and a number for each class."""
ALL_SUBSETS = 4
"""Up to this number of modalities, all subsets are probed."""


def evaluate(
    config: Config,
    model: TrainableModel,
    train: Dataset,
    test: Dataset,
    progress: Progress,
    *,
    refined_rows: int | None = None,
    baselines: bool = False,
    classifiers: Mapping[str, FrozenClassifier] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return all metrics by name, as JSON values.

    ``test_rows``: number of test rows.

    ``probe``: accuracy of a linear probe on posterior means by subset, and as ``joint`` on the means of the joint encoder if
    the model has one. It uses rows with a label and at least one modality of the subset. A subset is omitted if its training
    rows have fewer than two classes or no test row qualifies.

    ``texts``: only with text modalities, see ``evaluate_texts``.

    With ``pairing = "row"``, the metrics of ``evaluate_cross_modal`` and ``evaluate_pictures``, and as ``linear``, with
    ``baselines``, those of ``evaluate_linear``.

    ``refinement``: only if the model refines. The first ``refined_rows`` test rows, refined from the aligned posterior as in
    the service. ``elbo_by_step`` is the mean ELBO, estimated with the noise of the refinement steps. ``elbo_before`` and
    ``elbo_after`` are estimated with new noise, before and after the number of steps in training. ``raised`` and
    ``raised_fresh_noise`` are the shares of rows whose ELBO rises with either noise. ``elbo_joint`` is the mean ELBO of the
    joint encoder's posterior. All ELBOs are in weighted nats.

    ``coverage``: only if the model refines. {modality: {level: share}} over the same rows: the share of the refined posterior
    of all modalities in the central interval of the posterior of this modality, see ``calibration.coverage``.

    ``requests`` and ``recommended_steps``: only if the model refines, see ``evaluate_requests``.

    Args:
        refined_rows: test rows for ``refinement`` and ``coverage``, rounded up to full batches. None: all.
        baselines: whether to fit the linear baselines, which can take minutes.
        classifiers: of generated values, for the coherence of ``requests``.
    """
    torch.set_num_threads(config.thread_count)
    model = model.eval().requires_grad_(False)
    metrics: dict[str, Any] = {"test_rows": len(test)}
    if train.has_labels and (accuracies := _probe(config, model, train, test, progress)):
        metrics["probe"] = accuracies
    metrics |= evaluate_texts(model, train, test)
    if config.data.pairing == "row":
        metrics |= evaluate_cross_modal(model, test)
        if any(isinstance(modality, ImageModality) for modality in model.modalities):
            metrics |= evaluate_pictures(model, train, test, picture_network(config))
        if baselines:
            metrics["linear"] = evaluate_linear(train, test, model.latent, progress)
    if model.refines:
        metrics |= _refinement(config, model, test, progress, len(test) if refined_rows is None else refined_rows)
        metrics |= evaluate_requests(config, model, train, test, classifiers, progress)
    return metrics


def _probe(config: Config, model: TrainableModel, train: Dataset, test: Dataset, progress: Progress) -> dict[str, float]:
    """Compute ``probe`` of ``evaluate``."""
    subsets = probed_subsets([m.name for m in model.modalities])
    pool = _posterior_means(model, train, subsets, PROBE_POOL, progress, shuffle=True)
    means = _posterior_means(model, test, subsets, len(test), progress, shuffle=False)
    classes = {name: len(np.unique(labels)) for name, (_, labels) in pool.items()}
    points = {name: max(PROBE_POINTS, POINTS_PER_CLASS * count) for name, count in classes.items()}
    probed = [name for name in means if classes[name] > 1 and len(means[name][1])]
    return {name: linear_probe(*pool[name], *means[name], points=points[name], seed=config.seed) for name in probed}


def probed_subsets(names: Sequence[str]) -> dict[str, Tensor]:
    """Return the masks of the probed subsets by name.

    All subsets of up to ``ALL_SUBSETS`` modalities. Of more modalities: the single ones, all but one, and all.
    """
    count = len(names)
    sizes = (1, count - 1, count)
    return {name: mask for name, mask in named_subsets(names).items() if count <= ALL_SUBSETS or int(mask.sum()) in sizes}


def evaluate_cross_modal(model: TrainableModel, test: Dataset) -> dict[str, Any]:
    """Return metrics of rows whose modalities belong together. A metric is omitted if no test row has the needed modalities.

    ``retrieval``: {query: {gallery: {rows, recall@k, median_rank}}} between posterior means of single modalities, and from all
    others (``others``). The chance level is k / rows. A gallery with few distinct values, such as a class, is omitted: its
    rows cannot be distinguished.

    ``attributes``: {binary modality: {source: {rows, map, chance, f1, f1_chance, log_loss, calibration_error}}}. Probabilities
    are decoded from samples of the posterior of another modality, or of all others (``others``), and averaged. Probabilities
    decoded from the mean would be overconfident. The chance level of F1 predicts, for every row, the share of these rows that
    have each attribute.

    ``classes``: {categorical modality: {source: {rows, accuracy, majority, log_loss, calibration_error}}}. Probabilities are
    decoded from the mean of the posterior, as ``contrast.prediction`` trains it. ``calibration_error`` shows whether they are
    overconfident.

    ``numbers``: {vector modality: {source: {rows, r2}}}, from the mean of samples as those of attributes, see ``r2``.
    """
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    means: dict[str, _Rows] = {}
    decoded: dict[tuple[str, str], _Rows] = {}
    targets = [m.name for m in model.modalities if isinstance(m, BinaryModality | CategoricalModality | VectorModality)]
    binary = {m.name for m in model.modalities if isinstance(m, BinaryModality)}
    classes = {m.name for m in model.modalities if isinstance(m, CategoricalModality)}
    of_attributes, of_numbers = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    values: dict[str, _Rows] = {}
    present = _Rows(len(test))
    needed = rows_needed(test)
    with torch.no_grad():
        for start, batch in zip(itertools.count(0, BATCH_ROWS), test.batches(0, BATCH_ROWS, 0, shuffle=False), strict=False):
            if start >= needed:
                break
            present.add(batch.present)
            masks = [batch.present & mask for mask in (*singles, *~singles)]
            for index, posterior in enumerate(model.posteriors(batch.arrays, masks)):
                name = names[index] if index < len(names) else f"all but {names[index - len(names)]}"
                means.setdefault(name, _Rows(len(test))).add(posterior.mean)
                for target in targets:
                    if name not in (*names, f"all but {target}") or name == target:
                        continue
                    if target in classes:
                        predicted = model.decode(target, posterior.mean)
                    else:
                        z = posterior.sample(PREDICTION_SAMPLES, of_attributes if target in binary else of_numbers)
                        parts = [model.decode(target, z[:, sample]).flatten(1) for sample in range(PREDICTION_SAMPLES)]
                        predicted = torch.stack(parts).mean(0)
                    decoded.setdefault((target, name), _Rows(len(test))).add(predicted)
            for name in names:
                array = batch.arrays[name]
                values.setdefault(name, _Rows(len(test))).add(array if name in targets else hashes(array))
    rows = CrossModalRows(model.modalities, {name: v.all().numpy() for name, v in values.items()}, present.all().numpy())
    embeddings = {name: mean.all().numpy() for name, mean in means.items()}
    found: dict[str, Any] = {"retrieval": rows.retrieval(lambda query, gallery, _: (embeddings[query], embeddings[gallery]))}
    predictions = {pair: values.all().numpy() for pair, values in decoded.items()}
    found |= rows.predictions(lambda target, source, chosen: predictions[target, source][chosen])
    return {name: metrics for name, metrics in found.items() if metrics}


class _Rows:
    """Results of many batches, in one array.

    Memory is allocated once. A small result of each batch would lie between large arrays that are freed: the heap would grow
    with every batch, by far more than the results.

    Args:
        count: largest number of rows.
    """

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._values = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Append rows."""
        if not self._filled:
            self._values = rows.new_empty((self._count, *rows.shape[1:]))
        self._values[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def all(self) -> Tensor:
        """Return all rows that were added."""
        return self._values[: self._filled]


def _posterior_means(
    model: TrainableModel, data: Dataset, subsets: dict[str, Tensor], rows: int, progress: Progress, *, shuffle: bool
) -> dict[str, tuple[Float[np.ndarray, "_ latent"], Int64[np.ndarray, " _"]]]:
    """Return posterior means and labels by subset, and as ``joint`` of the joint encoder if the model has one.

    Only rows that have a label and at least one modality of the subset.
    """
    joint_name = figure_name("joint", subsets)
    steps = min(data.steps_per_epoch(BATCH_ROWS, shuffle=shuffle), -(-rows // BATCH_ROWS))
    means: dict[str, _Rows] = {}
    labels: dict[str, _Rows] = {}

    def add(name: str, mean: Tensor, classes: Tensor, selected: Tensor) -> None:
        means.setdefault(name, _Rows(steps * BATCH_ROWS)).add(mean[selected])
        labels.setdefault(name, _Rows(steps * BATCH_ROWS)).add(classes[selected])

    with progress.stage("embed", steps) as advance, torch.no_grad():
        for step, batch in zip(range(steps), data.batches(0, BATCH_ROWS, 0, shuffle=shuffle, average=True), strict=False):
            classes = batch.labels if batch.labels is not None else torch.full((len(batch.present),), UNKNOWN)
            masks = [batch.present & subset for subset in subsets.values()]
            for (name, subset), q in zip(subsets.items(), model.posteriors(batch.arrays, masks), strict=True):
                add(name, q.mean, classes, (batch.present & subset).any(1) & (classes != UNKNOWN))
            joint = model.joint_posterior(batch.arrays, batch.present)
            if joint is not None:
                add(joint_name, joint.mean, classes, classes != UNKNOWN)
            advance(step + 1, {})
    return {name: (means[name].all().numpy(), labels[name].all().numpy()) for name in means}


def _refinement(config: Config, model: TrainableModel, test: Dataset, progress: Progress, rows: int) -> dict[str, Any]:
    """Compute ``refinement`` and ``coverage`` of ``evaluate``."""
    steps, samples = config.horizon, config.refiner.serving_samples
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    generator, of_teacher = (torch.Generator().manual_seed(config.seed) for _ in range(2))
    total = min(test.steps_per_epoch(BATCH_ROWS, shuffle=False), -(-rows // BATCH_ROWS))
    elbos_by_step, elbos_with_new_noise, joint_elbos = (_Rows(total * BATCH_ROWS) for _ in range(3))
    covered = {name: _Rows(total * BATCH_ROWS) for name in names}
    with progress.stage("refine", total) as advance, torch.no_grad():
        for step, batch in zip(range(total), test.batches(0, BATCH_ROWS, 0, shuffle=False), strict=False):
            masks = [batch.present & single for single in singles]
            start, *students = model.posteriors(batch.arrays, [batch.present, *masks])
            assert isinstance(start, GaussianPosterior)
            by_step, evaluation = refined_elbos(model, batch, start.gaussian, steps, steps, samples, generator)
            elbos_by_step.add(by_step.T)
            elbos_with_new_noise.add(evaluation.T)
            joint = model.joint_posterior(batch.arrays, batch.present)
            assert joint is not None
            prior = standard_like(joint)
            noise = antithetic(torch.randn(len(batch.present), EVALUATION_SAMPLES // 2, model.latent, generator=generator))
            joint_elbos.add(model.objective(batch.arrays, batch.present, joint, prior, noise))
            *_, teacher = model.refinement_path(batch, joint, prior, config.refiner.steps, config.refiner.samples, of_teacher)
            for name, mask, student in zip(names, masks, students, strict=True):
                assert isinstance(student, GaussianPosterior)
                covered[name].add(coverage(student.gaussian, teacher).T[mask.any(1)])
            advance(step + 1, {})
    by_step, (before, after) = elbos_by_step.all().T, elbos_with_new_noise.all().T
    best = by_step[: steps + 1].amax(0)
    refinement = {
        "rows": by_step.shape[1],
        "steps": steps,
        "elbo_by_step": by_step.mean(1).tolist(),
        "elbo_before": before.mean().item(),
        "elbo_after": after.mean().item(),
        "elbo_joint": joint_elbos.all().mean().item(),
        "raised": (best > by_step[0]).float().mean().item(),
        "raised_fresh_noise": (after > before).float().mean().item(),
    }
    shares = {name: rows.all().mean(0).tolist() for name, rows in covered.items() if len(rows.all())}
    return {
        "refinement": refinement,
        "coverage": {
            name: {f"{level:g}": share for level, share in zip(LEVELS, of_levels, strict=True)}
            for name, of_levels in shares.items()
        },
    }
