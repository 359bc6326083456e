"""Throughput and memory against worker processes, batch size, latent size, modalities and refinement steps."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from concord.model import bundle
from tests.benchmarks.environments import FOLDER
from tests.benchmarks.overhead import run_loop
from tests.benchmarks.plan import Plan
from tests.support.server import ROOT

Points = dict[str, list[dict[str, float]]]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LATENTS = (16, 32, 64, 128, 256, 512)
MODALITIES = (2, 3, 4, 5, 6, 7, 8)
STEPS = (0, 1, 2, 5, 10, 20, 50)
ROWS = 32
FIGURE = "scaling.png"


def measure(plan: Plan) -> Points:
    """Return the points of each panel: ``x``, rows per second without and with steps, and the largest resident memory in MB."""
    digits = bundle.builtin(bundle.DEFAULT_BUNDLE)
    return {
        "batch": [_point(rows, digits, rows, (0, 1), plan) for rows in BATCHES],
        "latent": [_point(size, _untrained(latent=size, modalities=3), ROWS, (0, 1), plan) for size in LATENTS],
        "modalities": [_point(count, _untrained(latent=32, modalities=count), ROWS, (0, 1), plan) for count in MODALITIES],
        "steps": [_point(steps, digits, ROWS, (steps,), plan) for steps in STEPS],
    }


def export_bundles() -> None:
    """Export the bundles with random weights. Called first, so that a failed export does not waste the other measurements."""
    for latent in LATENTS:
        _untrained(latent=latent, modalities=3)
    for count in MODALITIES:
        _untrained(latent=32, modalities=count)


def plot(points: Points, worker_rounds: Mapping[str, Sequence[Mapping[str, float]]], folder: Path) -> Path:
    """Plot throughput and memory, and return the file of the figure in ``folder``.

    Args:
        points: what ``measure`` returns.
        worker_rounds: what ``workers.measure`` returns. Empty: the figure has no panel of them.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    titles = {
        "batch": "rows in a batch",
        "latent": f"latent size, {ROWS} rows",
        "modalities": f"modalities, {ROWS} rows",
        "steps": f"refinement steps, {ROWS} rows",
    }
    if worker_rounds:
        points = {"workers": _worker_points(worker_rounds), **points}
        cores = max(figures.get("cores", figures["workers"]) for rounds in worker_rounds.values() for figures in rounds)
        titles = {"workers": f"worker processes, {cores:.0f} cores, 64 connections", **titles}
    labels = {
        "encode": "encode",
        "step": "encode and 1 step",
        "rows_per_s": "encode and all steps",
        "photo_rps": "requests, a photo",
        "word_rps": "requests, a word",
    }
    figure, axes = plt.subplots(2, len(titles), figsize=(3.25 * len(titles), 5.2), sharex="col", layout="constrained")
    for column, (name, title) in enumerate(titles.items()):
        panel = points[name]
        throughput, memory = axes[0][column], axes[1][column]
        for key, label in labels.items():
            if key in panel[0]:
                throughput.plot([p["x"] for p in panel], [p[key] for p in panel], marker="o", markersize=3, label=label)
        memory.plot([p["x"] for p in panel], [p["resident_mb"] for p in panel], marker="o", markersize=3, color="tab:gray")
        if name == "workers":
            throughput.set(ylim=(0, None), xticks=[p["x"] for p in panel])
        else:
            throughput.set(yscale="log")
        memory.set(xlabel=title, ylim=(0, None))
        if name in ("batch", "latent"):
            memory.set_xscale("log", base=2)
        throughput.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("requests per second" if worker_rounds else "rows per second, 1 thread")
    axes[0][1 if worker_rounds else 0].set_ylabel("rows per second, 1 thread")
    axes[1][0].set_ylabel("resident memory, MB")
    file = folder / FIGURE
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file


def _worker_points(worker_rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return the medians of the rounds by number of workers."""
    names = ("photo_rps", "word_rps", "resident_mb")
    return [
        {"x": int(count), **{name: float(np.median([figures[name] for figures in rounds])) for name in names}}
        for count, rounds in worker_rounds.items()
    ]


def _point(x: float, folder: Path, rows: int, steps: Sequence[int], plan: Plan) -> dict[str, float]:
    """Return one point. It is measured in a separate process, so that its memory is that of this point only."""
    result = run_loop("scaling_point", plan.scaling, str(folder), str(rows), *map(str, steps))
    rates = result["rows_per_s"]
    named = {"rows_per_s": rates[0]} if len(steps) == 1 else dict(zip(("encode", "step"), rates, strict=True))
    return {"x": x, **named, "resident_mb": result["resident_mb"]}


def _untrained(*, latent: int, modalities: int) -> Path:
    """Return the folder of a bundle with random weights and the network sizes of the digits. It is exported once."""
    folder = FOLDER / "bundles" / f"{latent}-{modalities}"
    if not (folder / bundle.MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "tests.benchmarks.untrained", str(latent), str(modalities), str(folder)]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder
