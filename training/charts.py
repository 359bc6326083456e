"""Charts of a comparison, as PNG beside its results. The same results give the same files."""

from collections.abc import Mapping, Sequence
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
    charts = {"scores": scores_figure(content)}
    if refined := next((rows for _, rows in finished(content) if all(row.get("refined") and row["gap"] for row in rows)), None):
        charts["refinement"] = _refinement(refined[0])
    written = []
    for kind, figure in charts.items():
        file = folder / f"{content['name']}-{kind}.png"
        figure.savefig(file, dpi=100, metadata={"Software": None})  # whose version would change the file
        written.append(file)
    return written


def scores_figure(content: Mapping[str, Any]) -> Figure:
    """A panel for every score, from 0 to 1, and in it a bar for every model that is done, with the deviation over its seeds: as
    legible with twenty models as with four.

    Args:
        content: of a results file, see ``comparison.compare``.
    """
    models = finished(content)
    figure = Figure(figsize=(9, 1 + 0.22 * len(models)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(SCORES), sharey=True)
    for axes, (score, title) in zip(panels, SCORES.items(), strict=True):
        found = [average(rows, score) for _, rows in models]
        axes.barh(range(len(models)), [mean or 0 for mean, _ in found], xerr=[std or 0 for _, std in found], height=0.7)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(models)), [title_of(name) for name, _ in models])
    panels[0].set_ylim(len(models) - 0.5, -0.5)
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
