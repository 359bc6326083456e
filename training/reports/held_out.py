"""The choice of beta for each model, on training rows that were held out."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concord.training.reports.summary import average, display_name, finished_rows
from concord.training.reports.tables import COLUMNS, mean_and_std, write_section

CRITERION = ("probe", "means_one")
"""Accuracies of single modalities, without noise. The beta with the highest mean of both is chosen."""
SHOWN = (*CRITERION, "coherence_one", "frechet")
SHARED = ("budget", "test_rows", "held_out", "data", "classifier_accuracy")
"""Fields that must be equal in all files."""

Content = Mapping[str, Any]
"""Of a results file of ``compare`` with held-out rows."""


def choose_beta(contents: Sequence[Content]) -> dict[str, float]:
    """Return the beta with the highest mean of ``CRITERION`` for each model that all files have.

    Args:
        contents: one for each beta.

    Raises:
        ValueError: two files have the same beta, they differ in what ``SHARED`` names, or a model has other seeds in one of
            them.
    """
    by_beta = {content["beta"]: dict(finished_rows(content)) for content in _by_beta(contents)}
    if len(by_beta) < len(contents):
        raise ValueError(f"expected one file for each beta, received the betas {[content['beta'] for content in contents]}")
    for field in SHARED:
        if len({json.dumps(content[field], sort_keys=True) for content in contents}) > 1:
            raise ValueError(f"files with other {field} cannot be compared: {[content[field] for content in contents]}")
    shared = [name for name in next(iter(by_beta.values())) if all(name in rows for rows in by_beta.values())]
    for name in shared:
        if len({tuple(sorted(row["seed"] for row in rows[name])) for rows in by_beta.values()}) > 1:
            raise ValueError(f"{name}: every beta needs the same seeds")
    return {name: max(by_beta, key=lambda beta: _criterion(by_beta[beta][name])) for name in shared}


def _by_beta(contents: Sequence[Content]) -> list[Content]:
    return sorted(contents, key=lambda content: float(content["beta"]))


def _criterion(rows: Sequence[Mapping[str, Any]]) -> float:
    means = [average(rows, score)[0] for score in CRITERION]
    assert None not in means
    return statistics.fmean(mean for mean in means if mean is not None)


def choices_table(contents: Sequence[Content]) -> str:
    """Return a Markdown table with a row for each model and beta, the chosen beta of each model in bold.

    Args:
        contents: one for each beta.
    """
    chosen = choose_beta(contents)
    lines = [
        f"| model | β | seeds | {' | '.join(COLUMNS[score][0] for score in SHOWN)} |",
        f"| --- | --- | --- |{' --- |' * len(SHOWN)}",
    ]
    for model, beta in chosen.items():
        for content in _by_beta(contents):
            rows = dict(finished_rows(content))[model]
            cells = [mean_and_std(_scores(rows, score), COLUMNS[score][1]) for score in SHOWN]
            number = f"{content['beta']:g}"
            lines.append(
                f"| {display_name(model)} | {f'**{number}**' if content['beta'] == beta else number} | "
                f"{', '.join(str(row['seed']) for row in rows)} | {' | '.join(cells)} |"
            )
    incomplete = {name for content in contents for name, _ in finished_rows(content)} - chosen.keys()
    if incomplete:
        lines += ["", f"Not in the table, since a beta is missing: {', '.join(map(display_name, sorted(incomplete)))}."]
    return "\n".join(lines)


def _scores(rows: Sequence[Mapping[str, Any]], score: str) -> list[float]:
    return [mean for row in rows if (mean := average([row], score)[0]) is not None]


def write_choices(readme: Path, results: Path) -> None:
    """Write the table of all results files in ``results`` into the section ``held-out`` of the README.

    Without files the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    if contents:
        write_section(readme, "held-out", choices_table(contents))
