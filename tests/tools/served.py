"""Measures the figures of a bundle again over HTTP: ``python -m tests.tools.served CONFIG --data FOLDER``. Prints JSON.

A service is started, and computes the embeddings of the probe's rows and one sample of every missing modality. Probe and
classifiers are those of training. The exit code is 1 if a served figure differs from that of the bundle by more than noise.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from concord.client.client import Client
from concord.model import bundle
from concord.model.modality import TextModality
from concord.service.page.demo_data import as_input
from concord.training import config_file
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.evaluation.evaluate import PROBE_POOL
from concord.training.evaluation.metrics.frozen_classifier import FrozenClassifier, frozen_classifiers
from concord.training.evaluation.metrics.probe import balanced_points, linear_probe
from concord.training.objectives import named_subsets
from concord.training.progress import Progress
from tests.support.server import running

ITEMS = 32
POINTS = 500
PROBE_TOLERANCE = 0.01
"""Largest difference of probe accuracies: rows are in another order, and texts have no offset."""
DEVIATIONS = 4.0
"""Largest difference of coherences in standard deviations of the difference of two binomial shares, one sample per row."""

Rows = Sequence[Mapping[str, Any]]


def main(
    configuration: Path,
    folder: Annotated[Path | None, typer.Option("--data", envvar="CONCORD_DATA")] = None,
    bundle_path: Annotated[Path | None, typer.Option("--bundle", help="Default: the built-in bundle.")] = None,
    classifier_folder: Annotated[Path, typer.Option("--classifiers", help="Folder of the frozen classifiers.")] = Path(
        "runs/classifiers"
    ),
    rows: Annotated[int, typer.Option(help="Test rows of the coherence.")] = 1000,
) -> None:
    settings = config_file.read(configuration)
    path = bundle_path or bundle.builtin(bundle.DEFAULT_BUNDLE)
    train, test = dataset.load(settings, "train", folder), dataset.load(settings, "test", folder)
    classifiers = frozen_classifiers(settings, train, classifier_folder, Progress())
    metrics = bundle.read(path).manifest.metrics
    with running("--bundle", str(path)) as service, Client(f"http://{service.address}") as client:
        pool_items, pool_labels = read(train, PROBE_POOL, shuffle=True)
        test_rows = read(test, len(test), shuffle=False)
        chosen = balanced_points(pool_labels, POINTS, settings.seed)
        points = [pool_items[index] for index in chosen], pool_labels[chosen]
        figures = {"probe": probes(client, settings, points, test_rows, metrics["probe"])}
        if "coherence" in metrics:
            items, labels = read(test, rows, shuffle=True)
            sample = items[:rows], labels[:rows]
            figures["coherence"] = coherence(client, settings, sample, classifiers, train.class_names or (), metrics)
    print(json.dumps(figures, indent=1))
    sys.exit(not all(figure["agrees"] for of in figures.values() for figure in of.values()))


def read(rows: dataset.Dataset, count: int, *, shuffle: bool) -> tuple[list[dict[str, Any]], Any]:
    """Return at least ``count`` rows, if there are as many, as items of requests, and their class numbers."""
    items: list[dict[str, Any]] = []
    labels = []
    for batch in rows.batches(0, 500, 0, shuffle=shuffle):
        assert batch.labels is not None
        labels.append(batch.labels.numpy())
        arrays = {m: batch.arrays[m.name].numpy() for m in rows.modalities}
        items += [{m.name: as_input(m, array[index]) for m, array in arrays.items()} for index in range(len(batch.present))]
        if len(items) >= count:
            break
    return items, np.concatenate(labels)


def select_modalities(rows: Rows, subset: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in subset.split("+")} for row in rows]


def split_requests(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + ITEMS] for start in range(0, len(rows), ITEMS))


def probes(
    client: Client, settings: Config, points: tuple[Rows, Any], test_rows: tuple[Rows, Any], expected: dict[str, float]
) -> dict[str, Any]:
    """Return the accuracy of the probe on served embeddings, by subset."""
    figures = {}
    for subset in named_subsets([m.name for m in settings.modalities]):
        train_means, test_means = (
            np.concatenate([client.embed(items).matrix for items in split_requests(select_modalities(rows, subset))])
            for rows in (points[0], test_rows[0])
        )
        accuracy = linear_probe(train_means, points[1], test_means, test_rows[1], seed=settings.seed)
        agrees = abs(accuracy - expected[subset]) <= PROBE_TOLERANCE
        figures[subset] = {"served": round(accuracy, 4), "bundle": round(expected[subset], 4), "agrees": agrees}
    return figures


def coherence(
    client: Client,
    settings: Config,
    rows: tuple[Rows, Any],
    classifiers: Mapping[str, FrozenClassifier],
    class_names: Sequence[str],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return the share of served samples that show the class of their source, one sample each, by source and target."""
    items, labels = rows
    modalities = {m.name: m for m in settings.modalities}
    figures = {}
    for source, targets in metrics["coherence"]["cross"].items():
        classes: dict[str, list[int]] = {target: [] for target in targets}
        for number, inputs in enumerate(split_requests(select_modalities(items, source))):
            response = client.cross_generate(inputs, targets=list(targets), seed=number, image="raw")
            for target in targets:
                values = [result.generated[target][0] for result in response.results]
                if isinstance(modalities[target], TextModality):
                    classes[target] += [class_names.index(value) if value in class_names else -1 for value in values]
                else:
                    images = torch.from_numpy(np.stack([pixels(value) for value in values]))
                    classes[target] += classifiers[target].classify(images).tolist()
        for target, expected in targets.items():
            served = float(np.mean(np.array(classes[target]) == labels))
            deviation = math.sqrt(expected * (1 - expected) * (1 / len(labels) + 1 / metrics["generated_rows"]))
            agrees = abs(served - expected) <= DEVIATIONS * max(deviation, 1e-3)
            figures[f"{source} -> {target}"] = {"served": round(served, 4), "bundle": round(expected, 4), "agrees": agrees}
    return figures


def pixels(value: Any) -> np.ndarray:
    """Return an image as (channels, height, width) in [0, 1]."""
    if not isinstance(value, Image.Image):
        return np.array(value, dtype=np.float32)
    array = np.asarray(value, dtype=np.float32) / 255
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
