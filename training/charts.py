"""Charts of a comparison, as PNG beside its results. The same results give the same files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.scores import average, finished, title_of

SCORES = {
    "probe": "linear probe,\none modality",
    "coherence_one": "coherence from\none modality",
    "coherence_more": "coherence from\ntwo and more",
    "coherence_joint": "coherence from\nthe prior",
}


def draw_charts(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write <name>-scores.png, and <name>-refinement.png where a model refines; returns what was written."""
    charts = {"scores": _scores(content)}
    if refined := next((rows for _, rows in finished(content) if all(row.get("refined") and row["gap"] for row in rows)), None):
        charts["refinement"] = _refinement(refined[0])
    written = []
    for kind, figure in charts.items():
        file = folder / f"{content['name']}-{kind}.png"
        figure.savefig(file, dpi=100, metadata={"Software": None})  # whose version would change the file
        written.append(file)
    return written


def _scores(content: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Axes = figure.subplots()
    models = finished(content)
    width = 0.8 / max(1, len(models))
    for index, (model, rows) in enumerate(models):
        found = [average(rows, score) for score in SCORES]
        places = [place + (index - (len(models) - 1) / 2) * width for place in range(len(SCORES))]
        axes.bar(places, [mean or 0 for mean, _ in found], width, yerr=[std or 0 for _, std in found], label=title_of(model))
    axes.set_xticks(range(len(SCORES)), list(SCORES.values()))
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    return figure


def _refinement(row: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_step = row["gap"]["elbo_by_step"]
    left.plot(by_step, marker="o", label="refiner")
    left.axhline(row["gap"]["elbo_adam"], color="gray", linestyle="--", label="200 steps of Adam for every row")
    left.set(xlabel="steps", ylabel="ELBO of complete rows, weighted nats")
    left.legend(frameon=False)
    right.plot(row["refined"]["coherence"], marker="o", color="tab:green")
    right.set(xlabel="steps", ylabel="coherence from one modality")
    cost = row["refined"]["milliseconds_per_step"]
    if cost > 0:
        above = right.secondary_xaxis("top", functions=(lambda steps: steps * cost, lambda spent: spent / cost))
        above.set_xlabel("milliseconds a row, in batches")
    for axes in (left, right):
        axes.set_xticks(range(len(by_step)))
    return figure
