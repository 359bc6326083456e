"""Exports a finished run as a bundle: graphs, provenance, figures and model card."""

import io
import json
import logging
import platform
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from concord.model.bundle import Bundle
from concord.model.bundle.manifest import DataSource
from concord.model.encoder import EncoderFiles
from concord.model.gallery import Gallery
from concord.model.modality import EncodedModality, Modality
from concord.model.vae.multimodal import MultimodalVAE
from concord.training.checkpoint import Run, write_atomically
from concord.training.config import Config
from concord.training.data.dataset import Dataset
from concord.training.encoders.find import copy_files, read_files
from concord.training.errors import RunError
from concord.training.evaluation.requests import recommendation, request_scores
from concord.training.gallery import describe
from concord.training.run_data import RunData

GOLDEN_REPEATS = 2
"""Golden examples of each subset."""
GOLDEN_ROWS = 64
"""Largest number of golden examples. With seven or eight modalities it leaves out some of the 127 or 255 subsets."""
REFERENCE_EMBEDDINGS = 500
"""Test rows whose embeddings the bundle holds."""
LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "pillow", "torch")
FILE = "export.npz"
ENCODERS = "encoders"
"""Folder of the frozen encoders in the folder of a run."""


@dataclass(frozen=True)
class ExportInputs:
    """What a bundle takes from the data. Kept in the run's folder, so that ``export`` does not read the data."""

    modalities: tuple[Modality, ...]
    """Of the model, with the statistics of the training rows."""
    sources: tuple[DataSource, ...]
    """Provenance of the training rows, then of the test rows."""
    examples: Mapping[str, NDArray[Any]]
    """The first test rows by modality, each (row, *shape): inputs of the golden examples."""
    reference_embeddings: Mapping[str, NDArray[Any]]
    """``mean`` (row, latent) float32 of random test rows and, if classes have names, ``label`` (row,) text."""
    encoders: tuple[EncoderFiles, ...] = ()
    """Frozen encoders."""

    @classmethod
    def from_data(cls, model: MultimodalVAE, train: Dataset, test: Dataset) -> "ExportInputs":
        """Select the rows of the bundle and compute the reference embeddings with the trained model."""
        rows = min(GOLDEN_REPEATS * (2 ** len(model.modalities) - 1), GOLDEN_ROWS)
        batch = next(test.batches(0, rows, 0, shuffle=False))
        return cls(
            modalities=train.modalities,
            sources=(*train.sources, *test.sources),
            examples={name: array.numpy() for name, array in batch.arrays.items()},
            reference_embeddings=reference_embeddings(model, test),
            encoders=train.encoders,
        )

    def write(self, run: Run) -> None:
        """Write export.npz into the folder of a run, in one step. Frozen encoders are copied there before."""
        for encoder in self.encoders:
            copy_files(encoder, run.path / ENCODERS / encoder.name)
        facts = RunData(self.modalities, self.sources).to_json()
        arrays = {f"example.{name}": array for name, array in self.examples.items()}
        arrays |= {f"reference.{name}": array for name, array in self.reference_embeddings.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
        write_atomically(run.path / FILE, buffer.getvalue())

    @classmethod
    def read(cls, run: Run) -> "ExportInputs | None":
        """Read export.npz from the folder of a run. None: the file does not exist.

        Raises:
            RunError: the file is damaged.
        """
        file = run.path / FILE
        if not file.exists():
            return None
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
                arrays = dict(archive)
            facts = json.loads(arrays.pop("facts").item())
            data = RunData.from_json(facts)
            names = sorted({m.encoder for m in data.modalities if isinstance(m, EncodedModality)})
            return cls(
                modalities=data.modalities,
                sources=data.sources,
                examples=_with_prefix(arrays, "example."),
                reference_embeddings=_with_prefix(arrays, "reference."),
                encoders=tuple(read_files(run.path / ENCODERS / name, name) for name in names),
            )
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"{file}: damaged ({error!r}). Run evaluate again") from error


def _with_prefix(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def export(
    config: Config,
    model: MultimodalVAE,
    inputs: ExportInputs,
    figures: dict[str, Any],
    path: Path,
    images: Mapping[Path, str] = MappingProxyType({}),
    galleries: Mapping[str, Gallery] = MappingProxyType({}),
) -> Bundle:
    """Write the bundle of a trained model and return it. Errors: see ``model.vae.export.export_bundle``.

    Args:
        inputs: what the bundle takes from the data.
        figures: of ``evaluate``, for the manifest and the card.
        path: folder of the bundle.
        images: PNG files of generated samples and their captions, for the card.
        galleries: training examples by modality.
    """
    from concord.model.vae.export import export_bundle  # noqa: PLC0415 - 70 MiB, which init, check and fit do without

    # It warns for each graph that torchvision, which no graph needs, is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    facts = {
        "name": config.name,
        "version": config.version,
        "provenance": {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_revision": code_revision(),
            "config_sha256": config.sha256,
            "seed": config.seed,
            "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            "data": [source.model_dump() for source in inputs.sources],
        },
        "metrics": figures,
    }
    return export_bundle(
        model,
        path,
        facts=facts,
        samples=config.refiner.serving_samples,
        horizon=config.horizon,
        examples={name: torch.from_numpy(array) for name, array in inputs.examples.items()},
        card=model_card(config, inputs.sources, figures, images, inputs.encoders, describe(galleries)),
        encoders=inputs.encoders,
        galleries=galleries,
        reference_embeddings=inputs.reference_embeddings,
        pictures=list(images),
    )


def reference_embeddings(model: MultimodalVAE, test: Dataset) -> dict[str, NDArray[Any]]:
    """Return the reference embeddings of the bundle, see ``ExportInputs.reference_embeddings``.

    The test rows are a random choice, because a file may be sorted by class.
    """
    batch = next(test.batches(0, REFERENCE_EMBEDDINGS, 0, shuffle=True))
    with torch.no_grad():
        arrays = {"mean": model.cpu().eval().aligned(batch.arrays, batch.present).mean.numpy()}
    if batch.labels is None or test.class_names is None:
        return arrays
    names = [*test.class_names, ""]  # -1, an unknown class, has no name
    return {**arrays, "label": np.array([names[label] for label in batch.labels.tolist()])}


def code_revision() -> str:
    """Return the commit of the working tree, with -dirty if files differ from it. Outside a checkout: ``unknown``."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def model_card(
    config: Config,
    sources: Sequence[DataSource],
    figures: dict[str, Any],
    images: Mapping[Path, str] = MappingProxyType({}),
    encoders: Sequence[EncoderFiles] = (),
    galleries: Sequence[str] = (),
) -> str:
    """Return the model card as Markdown: what the model is, its data, its figures and samples, and its limits.

    Args:
        galleries: what ``gallery.describe`` returns.
    """
    lines = [f"# {config.name} {config.version}", ""]
    lines += [
        f"A multimodal VAE with a {config.network.latent}-dimensional z over "
        f"{', '.join(f'`{m.name}` ({m.kind})' for m in config.modalities)}. It computes the posterior of any subset of them, "
        "refines that posterior with the gradient of its objective, and generates every modality from it.",
        "",
        "## Training data",
        "",
        "| file | rows | sha256 | licence |",
        "| --- | --- | --- | --- |",
        *(f"| {s.file} | {s.rows:,} | `{s.sha256[:16]}` | {s.licence} |" for s in sources),
        "",
        f"Seed {config.seed}, configuration `{config.sha256[:16]}`. The licences of the data apply to the weights too.",
        "",
        *_encoder_lines(encoders),
        *_gallery_lines(galleries),
        "## Figures on the test split",
        "",
    ]
    if "probe" in figures:
        lines += ["Accuracy of a logistic regression on the posterior means of 500 training rows:", ""]
        lines += _table(["embedding of", "accuracy"], [[name, f"{value:.3f}"] for name, value in figures["probe"].items()])
    if "coherence" in figures:
        lines += [
            f"Share of samples that show the class of their source, with one sample of {figures['generated_rows']:,} rows:"
        ]
        lines += [""]
        rows = [
            [source, target, f"{share:.3f}"]
            for source, targets in figures["coherence"]["cross"].items()
            for target, share in targets.items()
        ]
        lines += _table(["from", "into", "coherence"], rows)
    if "retrieval" in figures:
        lines += ["Recall of a test row by another of its modalities, by cosine similarity of the means:", ""]
        lines += _nested_table(["query", "gallery"], {"recall@1": "recall@1", "recall@10": "recall@10"}, figures["retrieval"])
    if "attributes" in figures:
        lines += ["Attributes decoded from other modalities:", ""]
        titles = {"map": "mean average precision", "chance": "by chance", "f1": "F1", "f1_chance": "F1 by chance"}
        lines += _nested_table(["attributes", "from"], titles, figures["attributes"])
    refinement = figures["refinement"]
    lines += [
        f"Refinement of complete rows, {refinement['steps']} steps: the mean ELBO goes from {refinement['elbo_before']:.1f} to "
        f"{refinement['elbo_after']:.1f} weighted nats. It rises for {refinement['raised']:.1%} of rows "
        f"({refinement['raised_fresh_noise']:.1%} with independent evaluation noise).",
        "",
        *_request_lines(figures),
        *(f"{caption}:\n\n![Samples and their inputs]({image.name})\n" for image, caption in images.items()),
        "## Limits",
        "",
        "The model is trained on the data above only. Other inputs get an embedding too, but it has no meaning.",
    ]
    return "\n".join(lines) + "\n"


def _request_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the lines on refinement steps of requests, none if the figures of an earlier version have none of them."""
    if not (scores := request_scores(figures)):
        return []
    lines = ["What requests with some of the modalities get from the other ones after refinement steps. Higher is better:", ""]
    lines += _table(
        ["figure", *(f"step {step}" for step in figures["requests"]["steps"])],
        [[title, *(f"{value:.3f}" for value in by_step)] for title, by_step in scores.items()],
    )
    return [*lines, sentence, ""] if (sentence := recommendation(figures)) else lines


def _encoder_lines(encoders: Sequence[EncoderFiles]) -> list[str]:
    """Return the lines on frozen encoders, none if there is none."""
    if not encoders:
        return []
    rows = [
        [files.name, files.description.origin, files.description.licence, str(files.size), f"`{files.sha256[:16]}`"]
        for files in encoders
    ]
    return [
        "## Frozen encoders",
        "",
        "These pretrained networks compute the features of pictures and texts. They were not trained further. Their weights "
        "are part of this bundle, under their own licences.",
        "",
        *_table(["encoder", "origin", "licence", "features", "sha256"], rows),
    ]


def _gallery_lines(galleries: Sequence[str]) -> list[str]:
    """Return the lines on training examples, none if there is none."""
    if not galleries:
        return []
    return ["## Training examples", "", "This bundle contains training data:", "", *(f"- {line}" for line in galleries), ""]


def _nested_table(keys: list[str], titles: dict[str, str], figures: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table with a row for each pair of ``keys``: number of test rows, and the figures in ``titles``."""
    rows = [
        [outer, inner, str(values["rows"]), *(f"{values[figure]:.3f}" for figure in titles)]
        for outer, inners in figures.items()
        for inner, values in inners.items()
    ]
    return _table([*keys, "rows", *titles.values()], rows)


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty line."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)] + [""]
