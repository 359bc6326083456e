"""All figures of the comparison, for one trained model: every model by the same code, on the same rows, with the same noise."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.gaussian import Gaussian, antithetic, standard_like
from model.vae.generative import Generative
from model.vae.multimodal import MultimodalVAE
from training.config import Config
from training.data import Batch, Dataset
from training.metrics import frechet
from training.metrics.coherence import cross_coherence, joint_coherence
from training.metrics.cosine import cosine
from training.metrics.gap import adam_limit, elbos, gap_closed
from training.metrics.judge import ImageJudge, Judge
from training.metrics.likelihood import log_likelihood
from training.objectives import every_subset, named_subsets
from training.posteriors import GaussianPosterior, posteriors
from training.progress import Progress
from training.sources import UNKNOWN

BATCH_ROWS = 250
LIKELIHOOD_ROWS, LIKELIHOOD_SAMPLES = 100, 256
GAP_ROWS = 100

Subsets = Mapping[str, Bool[Tensor, " modality"]]


def measure(
    config: Config, model: Generative, test: Dataset, judges: Mapping[str, Judge], rows: int, progress: Progress
) -> dict[str, Any]:
    """Figures by name, JSON values; ``probe`` is of ``evaluate``. On ``rows`` test rows, the same for all models.

    ``coherence``: ``cross`` {source: {target: accuracy}} of samples from the posterior at temperature 1, ``cross_means`` of its
    mean, ``joint`` of samples from the prior.
    ``frechet``: {source: {image: distance}} between samples and the same number of real pictures, ``prior`` among the sources.
    ``judges``: accuracy of the image judges on the real pictures of these rows, which bounds what coherence can say.
    ``refined``: of ours, the mean of ``cross`` over single sources by step of refinement with that one modality.
    ``cosine``: {modality: {matched, shuffled}} between means from one and from all modalities, the latter refined by ours.
    ``gap``: of complete rows in weighted nats, by refinement step, against the Adam limit; null where they are no Gaussians.
    ``gap_closed``: the share of it that as many steps close as ours was trained for; null where nothing refines.
    ``log_likelihood``: plain nats: ``joint`` log p(X), ``conditional`` {source: log p(the others | source)}, and ``effective``,
    the effective samples of ``joint`` among ``samples``; null where the posterior has no density.
    """
    torch.set_num_threads(config.thread_count)
    model = model.eval().requires_grad_(False)
    began = time.perf_counter()
    batches = _first_batches(test, rows)
    figures: dict[str, Any] = {"rows": _count(batches)}
    with torch.no_grad():
        figures |= _generated(model, batches, judges, progress)
        if isinstance(model, MultimodalVAE):
            figures["refined"] = _by_step(config, model, batches, judges)
        figures["cosine"] = _cosine(config, model, batches)
        figures["gap"] = _gap(config, model, _first(batches[0], GAP_ROWS), progress)
        closed = figures["gap"] and figures["gap"]["closed_by_step"]
        figures["gap_closed"] = closed[config.horizon] if closed and isinstance(model, MultimodalVAE) else None
        figures["log_likelihood"] = _likelihoods(model, _first(batches[0], LIKELIHOOD_ROWS), progress)
    return {**figures, "evaluation_seconds": round(time.perf_counter() - began, 1)}


def generation(
    config: Config, model: Generative, test: Dataset, judges: Mapping[str, Judge], rows: int, progress: Progress
) -> dict[str, Any]:
    """Of ``measure`` what tells of generation: ``coherence``, ``frechet``, ``judges`` and, of ours, ``refined`` without its
    time; and ``generated_rows``, on how many test rows."""
    torch.set_num_threads(config.thread_count)
    batches = _first_batches(test, rows)
    model = model.eval().requires_grad_(False)
    with torch.no_grad():
        figures = {"generated_rows": _count(batches), **_generated(model, batches, judges, progress)}
        if isinstance(model, MultimodalVAE):
            figures["refined"] = {"coherence": _by_step(config, model, batches, judges)["coherence"]}
    return figures


def _first_batches(test: Dataset, rows: int) -> list[Batch]:
    size = min(BATCH_ROWS, rows, len(test))
    return [batch for _, batch in zip(range(rows // size), test.batches(0, size, 0, shuffle=True), strict=False)]


def _count(batches: list[Batch]) -> int:
    return sum(len(batch.present) for batch in batches)


def _generated(model: Generative, batches: list[Batch], judges: Mapping[str, Judge], progress: Progress) -> dict[str, Any]:
    names = [m.name for m in model.modalities]
    subsets = named_subsets(names)
    generator = torch.Generator().manual_seed(0)
    hits: dict[str, dict[tuple[str, str], list[Tensor]]] = {"cross": {}, "cross_means": {}}
    features: dict[tuple[str, str], list[Tensor]] = {}
    agreed, right = [], dict[str, list[Tensor]]()
    with progress.stage("generate", len(batches)) as advance:
        for done, batch in enumerate(batches, start=1):
            labels = batch.labels if batch.labels is not None else torch.full((len(batch.present),), UNKNOWN)
            masks = [batch.present & mask for mask in subsets.values()]
            for source, seen, q in zip(subsets, masks, posteriors(model, batch.arrays, masks), strict=True):
                targets = [name for name in judges if not subsets[source][names.index(name)]]
                if not targets:
                    continue
                chosen = seen.any(1) & (labels != UNKNOWN)
                sampled, mean = q.sample(1, generator)[chosen, 0], q.mean[chosen]
                for target in targets:
                    for kind, z in (("cross", sampled), ("cross_means", mean)):
                        hit = cross_coherence(model, judges, target, z, labels[chosen])
                        hits[kind].setdefault((source, target), []).append(hit)
                    _collect(features, source, target, judges[target], model.decode(target, sampled))
            prior = torch.randn(len(batch.present), model.latent, generator=generator)
            agreed.append(joint_coherence(model, judges, prior))
            for target, judge in judges.items():
                _collect(features, "prior", target, judge, model.decode(target, prior))
                _collect(features, "real", target, judge, batch.arrays[target])
                if isinstance(judge, ImageJudge):
                    known = batch.present[:, names.index(target)] & (labels != UNKNOWN)
                    right.setdefault(target, []).append((judge.classify(batch.arrays[target]) == labels)[known])
            advance(done, {})
    coherence: dict[str, Any] = {
        kind: _nested({k: torch.cat(v).float().mean().item() for k, v in of.items()}) for kind, of in hits.items()
    }
    coherence["joint"] = torch.cat(agreed).float().mean().item()
    rows = {key: torch.cat(parts).numpy() for key, parts in features.items()}
    distances = {
        (source, target): frechet.frechet_distance(made, rows["real", target])
        for (source, target), made in rows.items()
        if source != "real"
    }
    sure = {target: torch.cat(parts).float().mean().item() for target, parts in right.items()}
    return {"coherence": coherence, "frechet": _nested(distances), "judges": sure}


def _collect(features: dict[tuple[str, str], list[Tensor]], source: str, target: str, judge: Judge, values: Tensor) -> None:
    if isinstance(judge, ImageJudge):
        features.setdefault((source, target), []).append(judge.features(values))


def _by_step(config: Config, model: MultimodalVAE, batches: list[Batch], judges: Mapping[str, Judge]) -> dict[str, Any]:
    """Request-time refinement of single modalities, held to the aligned posterior as the service holds it: coherence of
    samples over all sources and targets, and milliseconds a row, by step to twice the horizon."""
    names = [m.name for m in model.modalities]
    generator, steps = torch.Generator().manual_seed(0), 2 * config.horizon
    hits: list[list[Tensor]] = [[] for _ in range(steps + 1)]
    seconds, rows = 0.0, 0
    for batch in (b for b in batches if b.labels is not None):
        for index, single in enumerate(every_subset(len(names))[: len(names)]):
            some = _rows(batch, batch.present[:, index])
            seen = some.present & single
            (q,) = posteriors(model, some.arrays, [seen])
            assert isinstance(q, GaussianPosterior)
            assert some.labels is not None
            since = time.perf_counter()
            path = refined_path(config, model, Batch(some.arrays, seen, some.labels), q.gaussian, q.gaussian, steps, generator)
            seconds, rows = seconds + time.perf_counter() - since, rows + len(seen)
            noise = torch.randn(q.mean.shape, generator=generator)
            for step, at in enumerate(path):
                z = model.draw(at, noise.unsqueeze(1))[:, 0]
                hits[step] += [cross_coherence(model, judges, t, z, some.labels) for t in judges if t != names[index]]
    coherence = [torch.cat(hit).float().mean().item() for hit in hits]
    return {"coherence": coherence, "milliseconds_per_step": 1000 * seconds / max(steps, 1) / max(rows, 1)}


def _cosine(config: Config, model: Generative, batches: list[Batch]) -> dict[str, dict[str, float]]:
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    means: dict[str, list[Tensor]] = {name: [] for name in [*names, "all"]}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        complete = _rows(batch, batch.present.all(1))
        everything = complete.present
        *alone, whole = posteriors(model, complete.arrays, [*(everything & single for single in singles), everything])
        for name, q in zip(names, alone, strict=True):
            means[name].append(q.mean)
        if isinstance(model, MultimodalVAE) and isinstance(whole, GaussianPosterior):
            start, steps = whole.gaussian, config.horizon
            *_, refined = refined_path(config, model, complete, start, standard_like(start), steps, generator)
            means["all"].append(refined.mean)
        else:
            means["all"].append(whole.mean)
    joined = {name: torch.cat(parts) for name, parts in means.items()}
    found = {name: cosine(joined[name], joined["all"], torch.Generator().manual_seed(0)) for name in names}
    return {name: {"matched": matched, "shuffled": shuffled} for name, (matched, shuffled) in found.items()}


def refined_path(
    config: Config,
    model: MultimodalVAE,
    batch: Batch,
    start: Gaussian,
    anchor: Gaussian,
    steps: int,
    generator: torch.Generator,
) -> list[Gaussian]:
    """lambda_0 ... lambda_steps, refined with the modalities present as the service does.

    Args:
        anchor: the prior where rows are complete, the start where they lack modalities.
    """
    noise = antithetic(torch.randn(len(batch.present), config.refiner.serving_samples // 2, model.latent, generator=generator))
    path = [start]
    for _ in range(steps):
        after, _ = model.refine_step(batch.arrays, batch.present, path[-1], anchor, noise)
        path.append(after)
    return path


def _gap(config: Config, model: Generative, batch: Batch, progress: Progress) -> dict[str, Any] | None:
    """Of what answers complete rows: for ours the aligned encoder and, from there, its refinement to twice the horizon."""
    complete = _rows(batch, batch.present.all(1))
    (q,) = posteriors(model, complete.arrays, [complete.present])
    if not isinstance(q, GaussianPosterior):
        return None
    progress.say(f"gap: 200 steps of Adam for {len(complete.present)} rows")
    path, milliseconds = [q.gaussian], 0.0
    if isinstance(model, MultimodalVAE):
        steps = 2 * config.horizon
        since = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        path = refined_path(config, model, complete, q.gaussian, standard_like(q.gaussian), steps, generator)
        milliseconds = 1000 * (time.perf_counter() - since) / max(steps, 1) / len(complete.present)
    limit = adam_limit(model, complete, q.gaussian, torch.Generator().manual_seed(1))
    *by_step, best = elbos(model, complete, [*path, limit], torch.Generator().manual_seed(2))
    steps_taken = torch.stack(by_step)
    found: dict[str, Any] = {
        "rows": len(complete.present),
        "elbo_by_step": steps_taken.mean(1).tolist(),
        "elbo_adam": best.mean().item(),
        "milliseconds_per_step": milliseconds,
    }
    found["closed_by_step"] = gap_closed(steps_taken, best) if best.mean() > steps_taken[0].mean() else None
    return found


def _likelihoods(model: Generative, batch: Batch, progress: Progress) -> dict[str, Any]:
    names = [m.name for m in model.modalities]
    complete = _rows(batch, batch.present.all(1))
    subsets = named_subsets(names)
    marginal: dict[str, Tensor | None] = {}
    effective = None
    masks = [complete.present & mask for mask in subsets.values()]
    with progress.stage("likelihood", len(subsets)) as advance:
        for done, (source, seen, q) in enumerate(
            zip(subsets, masks, posteriors(model, complete.arrays, masks), strict=True), start=1
        ):
            generator = torch.Generator().manual_seed(0)
            try:
                marginal[source], sizes = log_likelihood(model, complete.arrays, seen, q, LIKELIHOOD_SAMPLES, generator)
                effective = sizes.mean().item()
            except NotImplementedError:
                marginal[source] = None
            advance(done, {})
    *sources, everything = subsets
    joint = marginal[everything]
    assert joint is not None
    conditional = {s: None if (m := marginal[s]) is None else (joint - m).mean().item() for s in sources}
    return {
        "rows": len(complete.present),
        "samples": LIKELIHOOD_SAMPLES,
        "effective": effective,
        "joint": joint.mean().item(),
        "conditional": conditional,
    }


def _rows(batch: Batch, chosen: Bool[Tensor, " batch"]) -> Batch:
    arrays = {name: array[chosen] for name, array in batch.arrays.items()}
    return Batch(arrays, batch.present[chosen], None if batch.labels is None else batch.labels[chosen])


def _first(batch: Batch, rows: int) -> Batch:
    return _rows(batch, torch.arange(len(batch.present)) < rows)


def _nested(flat: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (source, target), value in flat.items():
        found.setdefault(source, {})[target] = value
    return found
