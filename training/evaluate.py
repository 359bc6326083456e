"""Figures of a trained model on the test split: what each subset's embedding knows, and what refinement gains."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.modality import BinaryModality
from model.vae.gaussian import antithetic, standard_like
from model.vae.generative import Generative
from model.vae.multimodal import MultimodalVAE
from training.config import Config
from training.data import Dataset
from training.metrics.attributes import f1, mean_average_precision
from training.metrics.probe import linear_probe
from training.metrics.refinement import JUDGE_SAMPLES, refined_elbos
from training.metrics.retrieval import recall_at
from training.objectives import every_subset, named_subsets
from training.posteriors import posteriors
from training.progress import Progress
from training.sources import UNKNOWN

BATCH_ROWS = 500
PROBE_POOL = 6000  # training rows that the probe's points are drawn from
ALL_SUBSETS = 4  # modalities whose subsets are all probed
RETRIEVAL_ROWS = 1000  # of a gallery, at most
ATTRIBUTE_SAMPLES = 32  # of a posterior


def evaluate(
    config: Config, vae: Generative, train: Dataset, test: Dataset, progress: Progress, *, refined_rows: int | None = None
) -> dict[str, Any]:
    """All figures, by name; JSON values.

    ``probe``: accuracy of a linear probe on the posterior means, by subset and on the joint encoder's means, among the rows
    that have a label and some of the subset; left out where these rows know fewer than two classes. Of ours alone:
    ``refinement``: of the first ``refined_rows`` test rows (None: all; in whole batches) as they are, from the aligned
    posterior, as the service refines: the mean ELBO by step with the noise that is climbed, and judged with fresh noise before
    and after the trained number of steps; ``raised`` is the share of rows whose ELBO rises, with either noise. ``joint`` is the
    mean ELBO of the joint encoder's own posterior.

    Where rows are pairs of their own (``pairing = "row"``), and some have both:
    ``retrieval``: {query: {gallery: {rows, recall@k}}}, by the means of one modality each; by chance recall@k is k / rows.
    ``attributes``: {binary modality: {source: {rows, map, chance, f1, f1_chance}}}, of probabilities decoded from samples of
    the posterior of another modality, or of all others (``others``), on average; those of the mean are too sure. By chance:
    every row is told what share of these rows has each attribute.
    """
    torch.set_num_threads(config.thread_count)
    vae = vae.eval().requires_grad_(False)
    figures: dict[str, Any] = {"test_rows": len(test)}
    if train.has_labels:
        subsets = probed_subsets([m.name for m in vae.modalities])
        pool = _means(vae, train, subsets, PROBE_POOL, progress, shuffle=True)
        means = _means(vae, test, subsets, len(test), progress, shuffle=False)
        # A class that all rows share, or that none has, cannot be probed.
        probed = [name for name in means if len(np.unique(pool[name][1])) > 1 and len(means[name][1])]
        if probed:
            figures["probe"] = {name: linear_probe(*pool[name], *means[name], seed=config.seed) for name in probed}
    if config.data.pairing == "row":
        figures |= across(vae, test)
    if isinstance(vae, MultimodalVAE):
        figures["refinement"] = _refinement(config, vae, test, progress, len(test) if refined_rows is None else refined_rows)
    return figures


def probed_subsets(names: Sequence[str]) -> dict[str, Tensor]:
    """Subsets by the names of their modalities; of more than four modalities the single ones, all but one, and all."""
    count = len(names)
    few = (1, count - 1, count)
    return {name: mask for name, mask in named_subsets(names).items() if count <= ALL_SUBSETS or int(mask.sum()) in few}


def across(vae: Generative, test: Dataset) -> dict[str, Any]:
    """``retrieval`` and ``attributes`` of ``evaluate``, each left out where no test row has what it needs."""
    names = [m.name for m in vae.modalities]
    singles = every_subset(len(names))[: len(names)]
    parts: dict[str, list[Tensor]] = {}
    told: dict[tuple[str, str], list[Tensor]] = {}
    binary = [m.name for m in vae.modalities if isinstance(m, BinaryModality)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for batch in test.batches(0, BATCH_ROWS, 0, shuffle=False):
            parts.setdefault("present", []).append(batch.present)
            masks = [batch.present & mask for mask in (*singles, *~singles)]
            for index, posterior in enumerate(posteriors(vae, batch.arrays, masks)):
                name = names[index] if index < len(names) else f"all but {names[index - len(names)]}"
                parts.setdefault(name, []).append(posterior.mean)
                for target in binary:
                    if name in (*names, f"all but {target}") and name != target:
                        z = posterior.sample(ATTRIBUTE_SAMPLES, generator)
                        decoded = vae.decode(target, z.flatten(0, 1)).view(len(z), ATTRIBUTE_SAMPLES, -1)
                        told.setdefault((target, name), []).append(decoded.mean(1))
            for target in binary:
                told.setdefault((target, target), []).append(batch.arrays[target])
    means = {name: torch.cat(tensors) for name, tensors in parts.items()}
    present = dict(zip(names, means.pop("present").T, strict=True))
    probabilities = {pair: torch.cat(tensors).numpy() for pair, tensors in told.items()}
    figures = {"retrieval": _retrieval(means, present), "attributes": _attributes(probabilities, binary, present)}
    return {name: found for name, found in figures.items() if found}


def _retrieval(means: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for query, gallery in itertools.permutations(present, 2):
        rows = (present[query] & present[gallery]).nonzero().flatten()[:RETRIEVAL_ROWS]
        if len(rows) > 1:
            recalls = recall_at(means[query][rows].numpy(), means[gallery][rows].numpy())
            figures = {f"recall@{k}": recall for k, recall in recalls.items()}
            told.setdefault(query, {})[gallery] = {"rows": len(rows), **figures}
    return told


def _attributes(
    probabilities: dict[tuple[str, str], Float[np.ndarray, "row attribute"]], targets: list[str], present: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Of ``probabilities`` by target and source; those of a target by itself are the truth."""
    told: dict[str, dict[str, Any]] = {}
    for target in targets:
        has = {source: rows for source, rows in present.items() if source != target}
        names = {source: source for source in has} | {f"all but {target}": "others"}
        has[f"all but {target}"] = torch.stack(list(has.values())).any(0)
        for source, name in names.items():
            rows = (has[source] & present[target]).numpy()
            truth, decoded = probabilities[target, target][rows], probabilities[target, source][rows]
            if found := mean_average_precision(truth, decoded):
                told.setdefault(target, {})[name] = {
                    "rows": len(truth),
                    "map": found[0],
                    "chance": found[1],
                    "f1": f1(truth, decoded),
                    "f1_chance": f1(truth, np.broadcast_to(truth.mean(axis=0), truth.shape)),
                }
    return told


def _means(
    vae: Generative, data: Dataset, subsets: dict[str, Tensor], rows: int, progress: Progress, *, shuffle: bool
) -> dict[str, tuple[Float[np.ndarray, "_ latent"], Int64[np.ndarray, " _"]]]:
    """Posterior means of every subset, and of the joint encoder under the name ``joint``, each with the labels of its rows:
    those that have a label and some of the subset."""
    means: dict[str, list[Tensor]] = {name: [] for name in [*subsets, "joint"]}
    labels: dict[str, list[Tensor]] = {name: [] for name in means}
    steps = min(data.steps_per_epoch(BATCH_ROWS, shuffle=shuffle), -(-rows // BATCH_ROWS))
    with progress.stage("embed", steps) as advance, torch.no_grad():
        for step, batch in zip(range(steps), data.batches(0, BATCH_ROWS, 0, shuffle=shuffle), strict=False):
            known = batch.labels if batch.labels is not None else torch.full((len(batch.present),), UNKNOWN)
            masks = [batch.present & subset for subset in subsets.values()]
            for (name, subset), q in zip(subsets.items(), posteriors(vae, batch.arrays, masks), strict=True):
                chosen = (batch.present & subset).any(1) & (known != UNKNOWN)
                means[name].append(q.mean[chosen])
                labels[name].append(known[chosen])
            if isinstance(vae, MultimodalVAE):
                means["joint"].append(vae.joint(batch.arrays, batch.present).mean[known != UNKNOWN])
                labels["joint"].append(known[known != UNKNOWN])
            advance(step + 1, {})
    return {name: (torch.cat(means[name]).numpy(), torch.cat(labels[name]).numpy()) for name in means if means[name]}


def _refinement(config: Config, vae: MultimodalVAE, test: Dataset, progress: Progress, rows: int) -> dict[str, Any]:
    steps, samples = config.horizon, config.refiner.serving_samples
    generator = torch.Generator().manual_seed(config.seed)
    climbed, judged, joint = [], [], []
    total = min(test.steps_per_epoch(BATCH_ROWS, shuffle=False), -(-rows // BATCH_ROWS))
    with progress.stage("refine", total) as advance, torch.no_grad():
        for step, batch in zip(range(total), test.batches(0, BATCH_ROWS, 0, shuffle=False), strict=False):
            start = vae.aligned(batch.arrays, batch.present)
            rises, verdict = refined_elbos(vae, batch, start, steps, steps, samples, generator)
            climbed.append(rises)
            judged.append(verdict)
            q = vae.joint(batch.arrays, batch.present)
            noise = antithetic(torch.randn(len(batch.present), JUDGE_SAMPLES // 2, vae.latent, generator=generator))
            joint.append(vae.objective(batch.arrays, batch.present, q, standard_like(q), noise))
            advance(step + 1, {})
    rises, (before, after) = torch.cat(climbed, dim=1), torch.cat(judged, dim=1)
    best = rises[: steps + 1].amax(0)
    return {
        "rows": sum(len(part) for part in joint),
        "steps": steps,
        "elbo_by_step": rises.mean(1).tolist(),
        "elbo_before": before.mean().item(),
        "elbo_after": after.mean().item(),
        "elbo_joint": torch.cat(joint).mean().item(),
        "raised": (best > rises[0]).float().mean().item(),
        "raised_fresh_noise": (after > before).float().mean().item(),
    }
