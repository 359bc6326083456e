"""The figures that a bundle carries, measured again over HTTP: ``python -m tests.served CONFIG --data FOLDER``. JSON.

A service of its own is asked for the embeddings of the probe's rows and for one sample of every missing modality; the probe and
the judges are those of training. Exit code 1 where a served figure differs from the carried one by more than noise.
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

from model import bundle
from model.modality import TextModality
from service.client import Client
from service.samples import as_input
from tests.server import running
from training import config_file, data
from training.config import Config
from training.evaluate import PROBE_POOL
from training.metrics.judge import Judge, judges
from training.metrics.probe import balanced_points, linear_probe
from training.objectives import named_subsets
from training.progress import Progress

ITEMS = 32
POINTS = 500
PROBE_TOLERANCE = 0.01
"""Rows come in another order, and texts without their offset."""
DEVIATIONS = 4.0
"""Of the difference of two binomial shares, each of one sample a row."""

Rows = Sequence[Mapping[str, Any]]


def main(
    configuration: Path,
    folder: Annotated[Path | None, typer.Option("--data", envvar="CONCORD_DATA")] = None,
    served: Annotated[Path | None, typer.Option("--bundle", help="Default: the built-in one.")] = None,
    judged: Annotated[Path, typer.Option(help="Where the judges are kept.")] = Path("runs/judges"),
    rows: Annotated[int, typer.Option(help="Test rows that something is generated from.")] = 1000,
) -> None:
    settings = config_file.read(configuration)
    path = served or bundle.builtin(bundle.DEFAULT_BUNDLE)
    train, test = data.load(settings, "train", folder), data.load(settings, "test", folder)
    who = judges(settings, train, judged, Progress())
    carried = bundle.read(path).manifest.metrics
    with running("--bundle", str(path)) as service, Client(f"http://{service.address}") as client:
        pool, everything = read(train, PROBE_POOL, shuffle=True), read(test, len(test), shuffle=False)
        chosen = balanced_points(pool[1], POINTS, settings.seed)
        points = [pool[0][index] for index in chosen], pool[1][chosen]
        figures = {"probe": probes(client, settings, points, everything, carried["probe"])}
        if "coherence" in carried:
            some = [row[:rows] for row in read(test, rows, shuffle=True)]
            figures["coherence"] = coherence(client, settings, some, who, train.class_names or (), carried)
    print(json.dumps(figures, indent=1))
    sys.exit(not all(figure["agrees"] for of in figures.values() for figure in of.values()))


def read(rows: data.Dataset, count: int, *, shuffle: bool) -> tuple[list[dict[str, Any]], Any]:
    """Rows as calls take them, and their classes."""
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


def part(rows: Rows, subset: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in subset.split("+")} for row in rows]


def in_calls(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + ITEMS] for start in range(0, len(rows), ITEMS))


def probes(
    client: Client, settings: Config, points: tuple[Rows, Any], everything: tuple[Rows, Any], carried: dict[str, float]
) -> dict[str, Any]:
    """Accuracy of the probe on served embeddings, by subset."""
    found = {}
    for subset in named_subsets([m.name for m in settings.modalities]):
        near, far = (
            np.concatenate([client.embed(call).matrix for call in in_calls(part(rows, subset))])
            for rows in (points[0], everything[0])
        )
        share = linear_probe(near, points[1], far, everything[1], seed=settings.seed)
        agrees = abs(share - carried[subset]) <= PROBE_TOLERANCE
        found[subset] = {"served": round(share, 4), "carried": round(carried[subset], 4), "agrees": agrees}
    return found


def coherence(
    client: Client,
    settings: Config,
    some: Sequence[Any],
    who: Mapping[str, Judge],
    names: Sequence[str],
    carried: dict[str, Any],
) -> dict[str, Any]:
    """How often one served sample shows the class of what it is generated from, by source and target."""
    items, labels = some
    modalities = {m.name: m for m in settings.modalities}
    found = {}
    for source, targets in carried["coherence"]["cross"].items():
        shown: dict[str, list[int]] = {target: [] for target in targets}
        for number, call in enumerate(in_calls(part(items, source))):
            reply = client.cross_generate(call, targets=list(targets), seed=number, image="raw")
            for target in targets:
                values = [result.generated[target][0] for result in reply.results]
                if isinstance(modalities[target], TextModality):
                    shown[target] += [names.index(value) if value in names else -1 for value in values]
                else:
                    shown[target] += who[target].classify(torch.from_numpy(np.stack([pixels(v) for v in values]))).tolist()
        for target, share in targets.items():
            served = float(np.mean(np.array(shown[target]) == labels))
            spread = math.sqrt(share * (1 - share) * (1 / len(labels) + 1 / carried["generated_rows"]))
            agrees = abs(served - share) <= DEVIATIONS * max(spread, 1e-3)
            found[f"{source} -> {target}"] = {"served": round(served, 4), "carried": round(share, 4), "agrees": agrees}
    return found


def pixels(value: Any) -> np.ndarray:
    """(channels, height, width) in [0, 1]."""
    if not isinstance(value, Image.Image):
        return np.array(value, dtype=np.float32)
    array = np.asarray(value, dtype=np.float32) / 255
    return array[np.newaxis] if array.ndim == 2 else array.transpose(2, 0, 1)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
