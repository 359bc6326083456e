"""Charts of a comparison as PNG files. The same results give the same files, byte for byte."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from concord.training.reports.summary import LOWER_IS_BETTER, average, display_name, finished_rows

AXES = {"probe": "linear probe,\none modality", "means_one": "coherence of means,\none modality", "frechet": "Fréchet distance"}


def write_charts(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write <name>-scores.png, and <name>-refinement.png if a model refines.

    Args:
        content: of a results file, see ``compare.compare``.

    Returns:
        the files written.
    """
    charts = {"scores": scores_figure(content)}
    for _, rows in finished_rows(content):
        if all(row.get("refined") and row.get("gap") for row in rows):
            charts["refinement"] = _refinement_figure(rows[0])
            break
    files = []
    for kind, figure in charts.items():
        file = folder / f"{content['name']}-{kind}.png"
        figure.savefig(file, dpi=100, metadata={"Software": None})  # the version of matplotlib would change the file
        files.append(file)
    return files


def scores_figure(content: Mapping[str, Any]) -> Figure:
    """Return a figure with one panel per score and one point per finished model in each panel. Further right is better.

    Panels show the range of their points. Bars show the standard deviation over seeds, circles the best mean of a panel. The
    layout stays legible with twenty models.

    Args:
        content: of a results file, see ``compare.compare``.
    """
    models = finished_rows(content)
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(models)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(AXES), sharey=True)
    for axes, (score, title) in zip(panels, AXES.items(), strict=True):
        lower_is_better = score in LOWER_IS_BETTER
        averages = [(place, *average(rows, score)) for place, (_, rows) in enumerate(models)]
        measured = [(place, mean, std or 0.0) for place, mean, std in averages if mean is not None]
        axes.set_title(f"{title} {'↓' if lower_is_better else '↑'}", fontsize=10)
        axes.grid(axis="x", alpha=0.4)
        if not measured:
            continue
        places, means, deviations = zip(*measured, strict=True)
        axes.errorbar(means, places, xerr=deviations, fmt="o", markersize=4)
        best = (min if lower_is_better else max)(means)
        axes.plot(best, places[means.index(best)], "o", markersize=9, markerfacecolor="none", color="black")
        if lower_is_better:
            axes.invert_xaxis()
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
