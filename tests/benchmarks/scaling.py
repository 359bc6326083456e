"""How throughput and memory grow with the batch, the latent size, the number of modalities and the refinement steps."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import bundle
from tests.benchmarks.environments import FOLDER
from tests.benchmarks.plan import Plan
from tests.server import ROOT

Points = dict[str, list[dict[str, float]]]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LATENTS = (16, 32, 64, 128, 256, 512)
MODALITIES = (2, 3, 4, 5, 6, 7, 8)
STEPS = (0, 1, 2, 5, 10, 20, 50)
ROWS = 32
PICTURE = "scaling.png"


def measure(plan: Plan) -> Points:
    """For each of the four, points of ``x``, rows a second and the largest resident memory in MB, without and with steps."""
    digits = bundle.builtin(bundle.DEFAULT_BUNDLE)
    return {
        "batch": [_point(rows, digits, rows, (0, 1), plan) for rows in BATCHES],
        "latent": [_point(size, _untrained(latent=size, modalities=3), ROWS, (0, 1), plan) for size in LATENTS],
        "modalities": [_point(count, _untrained(latent=32, modalities=count), ROWS, (0, 1), plan) for count in MODALITIES],
        "steps": [_point(steps, digits, ROWS, (steps,), plan) for steps in STEPS],
    }


def prepare() -> None:
    """Make the bundles that are measured, before half an hour is spent on the rest."""
    for latent in LATENTS:
        _untrained(latent=latent, modalities=3)
    for count in MODALITIES:
        _untrained(latent=32, modalities=count)


def draw(points: Points, folder: Path) -> Path:
    """A picture of all of it."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    titles = {
        "batch": "rows in a batch",
        "latent": f"latent size, {ROWS} rows",
        "modalities": f"modalities, {ROWS} rows",
        "steps": f"refinement steps, {ROWS} rows",
    }
    figure, axes = plt.subplots(2, len(titles), figsize=(13, 5.2), sharex="col", layout="constrained")
    for column, (name, title) in enumerate(titles.items()):
        found = points[name]
        above, below = axes[0][column], axes[1][column]
        for key, label in (("encode", "encode"), ("step", "encode and 1 step"), ("rows_per_s", "encode and all steps")):
            if key in found[0]:
                above.plot([p["x"] for p in found], [p[key] for p in found], marker="o", markersize=3, label=label)
        below.plot([p["x"] for p in found], [p["resident_mb"] for p in found], marker="o", markersize=3, color="tab:gray")
        above.set(yscale="log")
        below.set(xlabel=title, ylim=(0, None))
        if name in ("batch", "latent"):
            below.set_xscale("log", base=2)
        above.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("rows a second, 1 thread")
    axes[1][0].set_ylabel("largest resident memory, MB")
    file = folder / PICTURE
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file


def _point(x: float, folder: Path, rows: int, steps: Sequence[int], plan: Plan) -> dict[str, float]:
    """Measured in a process of its own, whose memory is that of this point alone."""
    command = [sys.executable, "-m", "tests.benchmarks.loops", "scale", str(plan.scaling), str(folder), str(rows)]
    told: dict[str, Any] = json.loads(
        subprocess.run([*command, *map(str, steps)], cwd=ROOT, capture_output=True, check=True).stdout
    )
    rates = told["rows_per_s"]
    named = {"rows_per_s": rates[0]} if len(steps) == 1 else dict(zip(("encode", "step"), rates, strict=True))
    return {"x": x, **named, "resident_mb": told["resident_mb"]}


def _untrained(*, latent: int, modalities: int) -> Path:
    """A bundle of the digits' network sizes, with random weights; made once."""
    folder = FOLDER / "bundles" / f"{latent}-{modalities}"
    if not (folder / bundle.MANIFEST).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "tests.benchmarks.untrained", str(latent), str(modalities), str(folder)]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder
