"""Charts of a comparison as PNG files. The same results give the same files, byte for byte."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from concord.training.reports.summary import average, display_name, finished_rows

SCORES = {
    "probe": "linear probe,\none modality",
    "coherence_one": "coherence from\none modality",
    "coherence_more": "coherence from\ntwo and more",
    "coherence_joint": "coherence from\nthe prior",
}


def write_charts(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write <name>-scores.png, and <name>-refinement.png if a model refines.

    Args:
        content: of a results file, see ``compare.compare``.

    Returns:
        the files written.
    """
    charts = {"scores": scores_figure(content)}
    for _, rows in finished_rows(content):
        if all(row.get("refined") and row["gap"] for row in rows):
            charts["refinement"] = _refinement_figure(rows[0])
            break
    files = []
    for kind, figure in charts.items():
        file = folder / f"{content['name']}-{kind}.png"
        figure.savefig(file, dpi=100, metadata={"Software": None})  # the version of matplotlib would change the file
        files.append(file)
    return files


def scores_figure(content: Mapping[str, Any]) -> Figure:
    """Return a figure with one panel per score, from 0 to 1, and one bar per finished model in each panel.

    Error bars show the standard deviation over seeds. The layout stays legible with twenty models.

    Args:
        content: of a results file, see ``compare.compare``.
    """
    models = finished_rows(content)
    figure = Figure(figsize=(9, 1 + 0.22 * len(models)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(SCORES), sharey=True)
    for axes, (score, title) in zip(panels, SCORES.items(), strict=True):
        averages = [average(rows, score) for _, rows in models]
        axes.barh(range(len(models)), [mean or 0 for mean, _ in averages], xerr=[std or 0 for _, std in averages], height=0.7)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(models)), [display_name(name) for name, _ in models])
    panels[0].set_ylim(len(models) - 0.5, -0.5)
    return figure


def _refinement_figure(row: Mapping[str, Any]) -> Figure:
    """Return a figure of ELBO and coherence by refinement step."""
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
        top = right.secondary_xaxis("top", functions=(lambda steps: steps * cost, lambda milliseconds: milliseconds / cost))
        top.set_xlabel("milliseconds a row, in batches")
    for axes in (left, right):
        axes.set_xticks(range(len(by_step)))
    return figure
