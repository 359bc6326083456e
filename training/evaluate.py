"""Figures of a trained model on the test split: what each subset's embedding knows, and what refinement gains."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.vae.gaussian import antithetic, standard_like
from model.vae.multimodal import MultimodalVAE
from training.config import Config
from training.data import Dataset
from training.metrics.probe import linear_probe
from training.metrics.refinement import JUDGE_SAMPLES, refined_elbos
from training.objectives import every_subset
from training.progress import Progress

BATCH_ROWS = 500
PROBE_POOL = 6000  # training rows that the probe's points are drawn from


def evaluate(config: Config, vae: MultimodalVAE, train: Dataset, test: Dataset, progress: Progress) -> dict[str, Any]:
    """All figures, by name; JSON values.

    ``probe``: accuracy of a linear probe on the posterior means, by subset and on the joint encoder's means; needs labels.
    ``refinement``: of rows as they are, from the aligned posterior, as the service refines: the mean ELBO by step with the
    noise that is climbed, and judged with fresh noise before and after the trained number of steps; ``raised`` is the share
    of rows whose ELBO rises, with either noise. ``joint`` is the mean ELBO of the joint encoder's own posterior.
    """
    torch.set_num_threads(config.threads)
    vae = vae.eval().requires_grad_(False)
    figures: dict[str, Any] = {"test_rows": len(test)}
    subsets = {
        "+".join(m.name for m, bit in zip(vae.modalities, mask, strict=True) if bit): mask
        for mask in every_subset(len(vae.modalities))
    }
    pool, pool_labels = _means(vae, train, subsets, PROBE_POOL, progress, shuffle=True)
    means, labels = _means(vae, test, subsets, len(test), progress, shuffle=False)
    if pool_labels is not None and labels is not None:
        figures["probe"] = {
            name: linear_probe(pool[name], pool_labels, means[name], labels, seed=config.seed) for name in means
        }
    figures["refinement"] = _refinement(config, vae, test, progress)
    return figures


def _means(
    vae: MultimodalVAE, data: Dataset, subsets: dict[str, Tensor], rows: int, progress: Progress, *, shuffle: bool
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]:
    """Posterior means of every subset, and of the joint encoder under the name ``joint``; labels beside them."""
    means: dict[str, list[Tensor]] = {name: [] for name in [*subsets, "joint"]}
    labels: list[Tensor] = []
    steps = min(data.steps_per_epoch(BATCH_ROWS, shuffle=shuffle), -(-rows // BATCH_ROWS))
    with progress.stage("embed", steps) as advance, torch.no_grad():
        for step, batch in zip(range(steps), data.batches(0, BATCH_ROWS, 0, shuffle=shuffle), strict=False):
            features = vae.aligned.features(batch.arrays)
            for name, subset in subsets.items():
                means[name].append(vae.aligned.fuse(features, batch.present & subset).mean)
            means["joint"].append(vae.joint(batch.arrays, batch.present).mean)
            if batch.labels is not None:
                labels.append(batch.labels)
            advance(step + 1, {})
    joined = {name: torch.cat(parts).numpy() for name, parts in means.items()}
    return joined, torch.cat(labels).numpy() if labels else None


def _refinement(config: Config, vae: MultimodalVAE, test: Dataset, progress: Progress) -> dict[str, Any]:
    steps, samples = config.refiner.steps, config.refiner.samples
    generator = torch.Generator().manual_seed(config.seed)
    climbed, judged, joint = [], [], []
    total = test.steps_per_epoch(BATCH_ROWS, shuffle=False)
    with progress.stage("refine", total) as advance, torch.no_grad():
        for step, batch in enumerate(test.batches(0, BATCH_ROWS, 0, shuffle=False)):
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
        "steps": steps,
        "elbo_by_step": rises.mean(1).tolist(),
        "elbo_before": before.mean().item(),
        "elbo_after": after.mean().item(),
        "elbo_joint": torch.cat(joint).mean().item(),
        "raised": (best > rises[0]).float().mean().item(),
        "raised_fresh_noise": (after > before).float().mean().item(),
    }
