"""Metrics of generation and inference, by the same code for every model, on the same rows, with noise of the same seed."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from concord.model.vae.gaussian import standard_like
from concord.training.config import Config
from concord.training.data.dataset import Batch, Dataset
from concord.training.data.sources import UNKNOWN
from concord.training.evaluation.metrics import frechet
from concord.training.evaluation.metrics.coherence import cross_coherence, joint_coherence
from concord.training.evaluation.metrics.cosine import cosine
from concord.training.evaluation.metrics.frozen_classifier import FrozenClassifier, ImageClassifier
from concord.training.evaluation.metrics.gap import ADAM_STEPS, adam_limit, elbos, gap_closed
from concord.training.evaluation.metrics.likelihood import best_proposal, log_likelihood
from concord.training.objectives import every_subset, figure_name, named_subsets
from concord.training.posteriors import GaussianPosterior
from concord.training.progress import Progress
from concord.training.trainable import TrainableModel

BATCH_ROWS = 250
LIKELIHOOD_ROWS, LIKELIHOOD_SAMPLES = 100, 256
GAP_ROWS = 100
_REAL, _ALL = "real values", "all modalities"  # among the names of modalities, which have no spaces

Classifiers = Mapping[str, FrozenClassifier]


def evaluate_comparison(
    config: Config,
    model: TrainableModel,
    test: Dataset,
    classifiers: Classifiers,
    rows: int,
    progress: Progress,
    *,
    bounds: bool = True,
) -> dict[str, Any]:
    """Return the metrics of a comparison by name, as JSON values, except those of ``evaluate.evaluate``.

    ``rows``: number of test rows used, the same rows for all models.

    ``coherence``: ``cross`` {source: {target: accuracy}} of one sample of the posterior, ``cross_means`` of its mean, ``joint``
    of samples of the prior (``TrainableModel.sample_prior``). A model with a flow scales its noise by ``flow.spread``.

    ``frechet``: {source: {image: distance}} between generated images and the same number of real images. One of the sources is
    ``prior``.

    ``classifier_accuracy``: accuracy of the image classifiers on the real images of these rows. Coherence can be higher:
    generated images may be more typical of their class.

    ``refined``: only if the model refines. Mean of ``cross`` over single sources, by step of refinement with that modality, and
    the milliseconds per row and step.

    ``cosine``: {modality: {matched, shuffled}} between the means of one and of all modalities. The latter are refined if the
    model refines.

    ``gap``: ELBO of complete rows in weighted nats, by refinement step, and that of the Adam limit. None for a posterior that
    is not Gaussian.

    ``gap_closed``: share of the gap closed by the number of steps in training. None if the model does not refine.

    ``log_likelihood``: of complete rows, log p(X) in plain nats. ``joint`` has samples of the posterior of all modalities,
    ``best`` of ``best_proposal``, often a tighter bound. ``effective`` and ``best_effective`` are the effective sample
    sizes out of ``samples``.

    Args:
        bounds: whether to measure ``gap``, ``gap_closed`` and ``log_likelihood``, which take most of the time.
    """
    torch.set_num_threads(config.thread_count)
    model = model.eval().requires_grad_(False)
    start_time = time.perf_counter()
    batches = _first_batches(test, rows)
    metrics: dict[str, Any] = {"rows": _row_count(batches)}
    with torch.no_grad():
        metrics |= _generation(model, batches, classifiers, progress)
        if model.refines:
            metrics["refined"] = _refined_coherence(config, model, batches, classifiers)
        metrics["cosine"] = _cosine(config, model, batches)
        if bounds:
            metrics["gap"] = _gap(config, model, batches[0].take(slice(GAP_ROWS)), progress)
            closed = metrics["gap"] and metrics["gap"]["closed_by_step"]
            metrics["gap_closed"] = closed[config.horizon] if closed and model.refines else None
            metrics["log_likelihood"] = _log_likelihood(model, batches[0].take(slice(LIKELIHOOD_ROWS)), progress)
    return {**metrics, "evaluation_seconds": round(time.perf_counter() - start_time, 1)}


def evaluate_generation(
    config: Config, model: TrainableModel, test: Dataset, classifiers: Classifiers, rows: int, progress: Progress
) -> dict[str, Any]:
    """Return the metrics of generation by name, as JSON values.

    ``generated_rows``: number of test rows used. ``coherence``, ``frechet``, ``classifier_accuracy`` and ``refined`` are those
    of ``evaluate_comparison``. ``refined`` has no milliseconds here, so that the metrics are reproducible.
    """
    torch.set_num_threads(config.thread_count)
    batches = _first_batches(test, rows)
    model = model.eval().requires_grad_(False)
    with torch.no_grad():
        metrics = {"generated_rows": _row_count(batches), **_generation(model, batches, classifiers, progress)}
        if model.refines:
            refined = _refined_coherence(config, model, batches, classifiers)
            metrics["refined"] = {"coherence": refined["coherence"]}
    return metrics


def _first_batches(test: Dataset, rows: int) -> list[Batch]:
    size = min(BATCH_ROWS, rows, len(test))
    return [batch for _, batch in zip(range(rows // size), test.batches(0, size, 0, shuffle=True), strict=False)]


def _row_count(batches: list[Batch]) -> int:
    return sum(len(batch.present) for batch in batches)


def _generation(model: TrainableModel, batches: list[Batch], classifiers: Classifiers, progress: Progress) -> dict[str, Any]:
    """Compute ``coherence``, ``frechet`` and ``classifier_accuracy`` of ``evaluate_comparison``."""
    names = [m.name for m in model.modalities]
    subsets = named_subsets(names)
    generator = torch.Generator().manual_seed(0)
    hits: dict[str, dict[tuple[str, str], list[Tensor]]] = {"cross": {}, "cross_means": {}}
    features: dict[tuple[str, str], list[Tensor]] = {}
    joint_hits, real_hits = [], dict[str, list[Tensor]]()
    with progress.stage("generate", len(batches)) as advance:
        for done, batch in enumerate(batches, start=1):
            labels = batch.labels if batch.labels is not None else torch.full((len(batch.present),), UNKNOWN)
            masks = [batch.present & mask for mask in subsets.values()]
            for source, present, q in zip(subsets, masks, model.posteriors(batch.arrays, masks), strict=True):
                targets = [name for name in classifiers if not subsets[source][names.index(name)]]
                if not targets:
                    continue
                selected = present.any(1) & (labels != UNKNOWN)
                sampled, mean = q.sample(1, generator)[selected, 0], q.mean[selected]
                for target in targets:
                    for kind, z in (("cross", sampled), ("cross_means", mean)):
                        hit = cross_coherence(model, classifiers, target, z, labels[selected])
                        hits[kind].setdefault((source, target), []).append(hit)
                    _append_features(features, source, target, classifiers[target], model.decode(target, sampled))
            prior = model.sample_prior(torch.randn(len(batch.present), model.latent, generator=generator))
            joint_hits.append(joint_coherence(model, classifiers, prior))
            for target, classifier in classifiers.items():
                _append_features(features, figure_name("prior", names), target, classifier, model.decode(target, prior))
                _append_features(features, _REAL, target, classifier, batch.arrays[target])
                if isinstance(classifier, ImageClassifier):
                    labelled = batch.present[:, names.index(target)] & (labels != UNKNOWN)
                    hit = (classifier.classify(batch.arrays[target]) == labels)[labelled]
                    real_hits.setdefault(target, []).append(hit)
            advance(done, {})
    coherence: dict[str, Any] = {
        kind: _nest({pair: torch.cat(parts).float().mean().item() for pair, parts in by_pair.items()})
        for kind, by_pair in hits.items()
    }
    coherence["joint"] = torch.cat(joint_hits).float().mean().item()
    arrays = {pair: torch.cat(parts).numpy() for pair, parts in features.items()}
    distances = {
        (source, target): frechet.frechet_distance(generated, arrays[_REAL, target])
        for (source, target), generated in arrays.items()
        if source != _REAL
    }
    accuracy = {target: torch.cat(parts).float().mean().item() for target, parts in real_hits.items()}
    return {"coherence": coherence, "frechet": _nest(distances), "classifier_accuracy": accuracy}


def _append_features(
    features: dict[tuple[str, str], list[Tensor]], source: str, target: str, classifier: FrozenClassifier, values: Tensor
) -> None:
    if isinstance(classifier, ImageClassifier):
        features.setdefault((source, target), []).append(classifier.features(values))


def _refined_coherence(config: Config, model: TrainableModel, batches: list[Batch], classifiers: Classifiers) -> dict[str, Any]:
    """Compute ``refined`` of ``evaluate_comparison``, up to twice the number of steps in training.

    As in the service, the KL term of incomplete rows is taken to the aligned posterior.
    """
    names = [m.name for m in model.modalities]
    generator, steps = torch.Generator().manual_seed(0), 2 * config.horizon
    hits: list[list[Tensor]] = [[] for _ in range(steps + 1)]
    seconds, rows = 0.0, 0
    for batch in (b for b in batches if b.labels is not None):
        for index, single in enumerate(every_subset(len(names))[: len(names)]):
            complete = batch.take(batch.present[:, index])
            present = complete.present & single
            (q,) = model.posteriors(complete.arrays, [present])
            assert isinstance(q, GaussianPosterior)
            assert complete.labels is not None
            masked = Batch(complete.arrays, present, complete.labels)
            start_time = time.perf_counter()
            path = model.refinement_path(masked, q.gaussian, q.gaussian, steps, config.refiner.serving_samples, generator)
            seconds, rows = seconds + time.perf_counter() - start_time, rows + len(present)
            noise = torch.randn(q.mean.shape, generator=generator)
            for step, posterior in enumerate(path):
                z = model.sample(posterior, noise.unsqueeze(1))[:, 0]
                targets = [name for name in classifiers if name != names[index]]
                hits[step] += [cross_coherence(model, classifiers, target, z, complete.labels) for target in targets]
    coherence = [torch.cat(parts).float().mean().item() for parts in hits]
    return {"coherence": coherence, "milliseconds_per_step": 1000 * seconds / max(steps, 1) / max(rows, 1)}


def _cosine(config: Config, model: TrainableModel, batches: list[Batch]) -> dict[str, dict[str, float]]:
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    means: dict[str, list[Tensor]] = {name: [] for name in [*names, _ALL]}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        complete = batch.take(batch.present.all(1))
        masks = [*(complete.present & single for single in singles), complete.present]
        *unimodal, multimodal = model.posteriors(complete.arrays, masks)
        for name, q in zip(names, unimodal, strict=True):
            means[name].append(q.mean)
        if isinstance(multimodal, GaussianPosterior):
            start, samples = multimodal.gaussian, config.refiner.serving_samples
            path = model.refinement_path(complete, start, standard_like(start), config.horizon, samples, generator)
            means[_ALL].append(path[-1].mean)
        else:
            means[_ALL].append(multimodal.mean)
    joined = {name: torch.cat(parts) for name, parts in means.items()}
    cosines = {name: cosine(joined[name], joined[_ALL], torch.Generator().manual_seed(0)) for name in names}
    return {name: {"matched": matched, "shuffled": shuffled} for name, (matched, shuffled) in cosines.items()}


def _gap(config: Config, model: TrainableModel, batch: Batch, progress: Progress) -> dict[str, Any] | None:
    """Compute ``gap`` of ``evaluate_comparison`` from the posterior of complete rows, up to twice the steps in training."""
    complete = batch.take(batch.present.all(1))
    (q,) = model.posteriors(complete.arrays, [complete.present])
    if not isinstance(q, GaussianPosterior):
        return None
    rows = len(complete.present)
    progress.say(f"gap: {ADAM_STEPS} steps of Adam for {rows} rows")
    start, steps, samples = q.gaussian, 2 * config.horizon if model.refines else 0, config.refiner.serving_samples
    start_time = time.perf_counter()
    path = model.refinement_path(complete, start, standard_like(start), steps, samples, torch.Generator().manual_seed(0))
    milliseconds = 1000 * (time.perf_counter() - start_time) / max(steps, 1) / rows if model.refines else 0.0
    limit = adam_limit(model, complete, start, torch.Generator().manual_seed(1))
    *step_elbos, limit_elbo = elbos(model, complete, [*path, limit], torch.Generator().manual_seed(2))
    by_step = torch.stack(step_elbos)
    has_gap = limit_elbo.mean() > by_step[0].mean()
    return {
        "rows": rows,
        "elbo_by_step": by_step.mean(1).tolist(),
        "elbo_adam": limit_elbo.mean().item(),
        "milliseconds_per_step": milliseconds,
        "closed_by_step": gap_closed(by_step, limit_elbo) if has_gap else None,
    }


def _log_likelihood(model: TrainableModel, batch: Batch, progress: Progress) -> dict[str, Any]:
    """Compute ``log_likelihood`` of ``evaluate_comparison``."""
    complete = batch.take(batch.present.all(1))
    (posterior,) = model.posteriors(complete.arrays, [complete.present])
    progress.say(f"likelihood: {ADAM_STEPS} steps of Adam for {len(complete.present)} rows")
    generator = torch.Generator().manual_seed(0)
    best = best_proposal(model, complete.arrays, complete.present, posterior.mean, generator)
    metrics: dict[str, Any] = {"rows": len(complete.present), "samples": LIKELIHOOD_SAMPLES}
    for name, effective, proposal in (("joint", "effective", posterior), ("best", "best_effective", best)):
        generator = torch.Generator().manual_seed(0)
        bound, sizes = log_likelihood(model, complete.arrays, complete.present, proposal, LIKELIHOOD_SAMPLES, generator)
        metrics |= {name: bound.mean().item(), effective: sizes.mean().item()}
    return metrics


def _nest(flat: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for (source, target), value in flat.items():
        nested.setdefault(source, {})[target] = value
    return nested
