"""A finished run as a bundle: provenance, figures, model card."""

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle
from model.manifest import DataSource
from model.vae.export import export_bundle
from model.vae.multimodal import MultimodalVAE
from training.config import Config
from training.data import Dataset

GOLDEN_ROUNDS = 2  # every subset appears so often among the golden examples
GOLDEN_ROWS = 64  # at most, which is when some subsets are left out: eight modalities have 255
LANDMARKS = 500
"""Test rows on the bundle's map."""
LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "pillow", "torch")


def export(
    config: Config,
    vae: MultimodalVAE,
    train: Dataset,
    test: Dataset,
    figures: dict[str, Any],
    path: Path,
    pictures: Sequence[Path] = (),
) -> Bundle:
    """Write the bundle of a trained model, see ``model.vae.export.export_bundle`` for what can go wrong.

    Args:
        figures: of ``evaluate``; they go into the manifest and the card.
        pictures: of what the model generates; they go into the bundle, for the card.
    """
    rows = min(GOLDEN_ROUNDS * (2 ** len(vae.modalities) - 1), GOLDEN_ROWS)
    sources = [*train.sources, *test.sources]
    facts = {
        "name": config.name,
        "version": config.version,
        "provenance": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_revision": code_revision(),
            "config_sha256": config.sha256,
            "seed": config.seed,
            "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "data": [source.model_dump() for source in sources],
        },
        "metrics": figures,
    }
    examples = next(test.batches(0, rows, 0, shuffle=False)).arrays
    return export_bundle(
        vae,
        path,
        facts=facts,
        samples=config.refiner.serving_samples,
        horizon=config.horizon,
        examples=examples,
        card=model_card(config, sources, figures, pictures),
        landmarks=landmarks(vae, test),
        pictures=pictures,
    )


def landmarks(vae: MultimodalVAE, test: Dataset) -> dict[str, NDArray[Any]]:
    """The bundle's map: ``mean`` (rows, latent) float32 of test rows drawn at random (a file may be sorted) and, where they
    have classes, ``label`` (rows,) text."""
    batch = next(test.batches(0, LANDMARKS, 0, shuffle=True))
    with torch.no_grad():
        found = {"mean": vae.cpu().eval().aligned(batch.arrays, batch.present).mean.numpy()}
    if batch.labels is None or test.class_names is None:
        return found
    names = [*test.class_names, ""]  # -1, an unknown class, has no name
    return {**found, "label": np.array([names[label] for label in batch.labels.tolist()])}


def code_revision() -> str:
    """Commit of the working tree, marked when files differ from it; ``unknown`` outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def model_card(config: Config, sources: list[DataSource], figures: dict[str, Any], pictures: Sequence[Path] = ()) -> str:
    """Markdown: what the model is, what it saw, how well it does and looks, what it must not be used for."""
    lines = [f"# {config.name} {config.version}", ""]
    lines += [
        f"A multimodal VAE with a {config.network.latent}-dimensional z over "
        f"{', '.join(f'`{m.name}` ({m.kind})' for m in config.modalities)}: a posterior of any subset of them, "
        "refinement of that posterior by the gradient of its objective, and every modality generated from it.",
        "",
        "## Training data",
        "",
        "| file | rows | sha256 | licence |",
        "| --- | --- | --- | --- |",
        *(f"| {s.file} | {s.rows:,} | `{s.sha256[:16]}` | {s.licence} |" for s in sources),
        "",
        f"Seed {config.seed}, configuration `{config.sha256[:16]}`. The licences of the data bind the weights too.",
        "",
        "## Figures on the test split",
        "",
    ]
    if "probe" in figures:
        lines += ["Accuracy of a logistic regression on the posterior means of 500 training rows:", ""]
        lines += _table(["embedding of", "accuracy"], [[name, f"{value:.3f}"] for name, value in figures["probe"].items()])
    if "coherence" in figures:
        lines += [
            f"How often one sample shows the class of what it is generated from, on {figures['generated_rows']:,} rows:",
            "",
        ]
        cross = figures["coherence"]["cross"]
        lines += _table(["from", "into", "coherence"], [[s, t, f"{v:.3f}"] for s, of in cross.items() for t, v in of.items()])
    if "retrieval" in figures:
        lines += ["Recall of a test row by another of its modalities, by cosine similarity of the means:", ""]
        lines += _nested_table(["query", "gallery"], {"recall@1": "recall@1", "recall@10": "recall@10"}, figures["retrieval"])
    if "attributes" in figures:
        lines += ["Attributes decoded from other modalities:", ""]
        titles = {"map": "mean average precision", "chance": "by chance", "f1": "F1", "f1_chance": "F1 by chance"}
        lines += _nested_table(["attributes", "from"], titles, figures["attributes"])
    refinement = figures["refinement"]
    lines += [
        f"Refinement of complete rows, {refinement['steps']} steps: the ELBO goes from {refinement['elbo_before']:.1f} to "
        f"{refinement['elbo_after']:.1f} weighted nats on average and rises for {refinement['raised']:.1%} of rows "
        f"({refinement['raised_fresh_noise']:.1%} judged with fresh noise).",
        "",
        *(f"![What one sample of each posterior gives, beside what it was given]({picture.name})\n" for picture in pictures),
        "## Limits",
        "",
        "The model knows only what the data above shows. Anything else gets an embedding too, and it means nothing.",
    ]
    return "\n".join(lines) + "\n"


def _nested_table(keys: list[str], titles: dict[str, str], told: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each pair of ``keys``: on how many test rows, and the figures that ``titles`` names."""
    rows = [
        [outer, inner, str(found["rows"]), *(f"{found[figure]:.3f}" for figure in titles)]
        for outer, inners in told.items()
        for inner, found in inners.items()
    ]
    return _table([*keys, "rows", *titles.values()], rows)


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, and the empty one after it."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)] + [""]
