"""The choice of beta for each model and of settings of Concord, on training rows that were held out."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concord.training.config import DEFAULT_MODEL
from concord.training.reports.summary import average, display_name, finished_rows, row_scores
from concord.training.reports.tables import COLUMNS, mean_and_std, write_section

CRITERION = ("probe", "means_one")
"""Accuracies of single modalities, without noise. The beta with the highest mean of both is chosen."""
EQUAL = 0.005
"""A smaller difference of accuracies counts as equal, as in the documents with one seed. Among equal betas, the one with the
lowest Fréchet distance is chosen."""
SHOWN = (*CRITERION, "coherence_one", "frechet")
SHOWN_OF_VARIANTS = ("probe", "means_one", "coherence_one", "coherence_more", "coherence_joint", "frechet", "cosine")
SHARED = ("budget", "test_rows", "held_out", "data", "classifier_accuracy")
"""Fields that must be equal in all files."""

Content = Mapping[str, Any]
"""Of a results file of ``compare`` with held-out rows."""


def choose_beta(contents: Sequence[Content]) -> dict[str, float]:
    """Return the beta with the highest mean of ``CRITERION`` for each model that all files have, see ``EQUAL``.

    Args:
        contents: one for each beta.

    Raises:
        ValueError: two files have the same beta, they differ in what ``SHARED`` names, or a model has other seeds in one of
            them.
    """
    by_beta = {content["beta"]: _models(content) for content in _by_beta(contents)}
    if len(by_beta) < len(contents):
        raise ValueError(f"expected one file for each beta, received the betas {[content['beta'] for content in contents]}")
    for field in SHARED:
        if len({json.dumps(content[field], sort_keys=True) for content in contents}) > 1:
            raise ValueError(f"files with other {field} cannot be compared: {[content[field] for content in contents]}")
    shared = [name for name in next(iter(by_beta.values())) if all(name in rows for rows in by_beta.values())]
    for name in shared:
        if len({tuple(sorted(row["seed"] for row in rows[name])) for rows in by_beta.values()}) > 1:
            raise ValueError(f"{name}: every beta needs the same seeds")
    return {name: _best({beta: rows[name] for beta, rows in by_beta.items()}) for name in shared}


def _best(by_beta: Mapping[float, Sequence[Mapping[str, Any]]]) -> float:
    accuracy = {beta: _mean(rows, CRITERION) for beta, rows in by_beta.items()}
    equal = [beta for beta in by_beta if max(accuracy.values()) - accuracy[beta] < EQUAL]
    return min(equal, key=lambda beta: _mean(by_beta[beta], ["frechet"]))


def _models(content: Content) -> dict[str, list[Mapping[str, Any]]]:
    """Return the finished rows by model, without variants of a configuration."""
    return {name: rows for name, rows in finished_rows(content) if "variant" not in rows[0]}


def _by_beta(contents: Sequence[Content]) -> list[Content]:
    return sorted(contents, key=lambda content: float(content["beta"]))


def _mean(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> float:
    means = [average(rows, score)[0] for score in scores]
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
            rows = _models(content)[model]
            cells = _cells(rows, SHOWN)
            number = f"{content['beta']:g}"
            lines.append(
                f"| {display_name(model)} | {f'**{number}**' if content['beta'] == beta else number} | "
                f"{', '.join(str(row['seed']) for row in rows)} | {' | '.join(cells)} |"
            )
    incomplete = {name for content in contents for name in _models(content)} - chosen.keys()
    if incomplete:
        lines += ["", f"Not in the table, since a beta is missing: {', '.join(map(display_name, sorted(incomplete)))}."]
    return "\n".join(lines)


def variants_table(content: Content) -> str:
    """Return a Markdown table of Concord and the variants of its configuration in one results file."""
    lines = [
        f"| configuration | seeds | {' | '.join(COLUMNS[score][0] for score in SHOWN_OF_VARIANTS)} |",
        f"| --- | --- |{' --- |' * len(SHOWN_OF_VARIANTS)}",
    ]
    for name, rows in finished_rows(content):
        if name == DEFAULT_MODEL or "variant" in rows[0]:
            seeds = ", ".join(str(row["seed"]) for row in rows)
            lines.append(f"| {display_name(name)} | {seeds} | {' | '.join(_cells(rows, SHOWN_OF_VARIANTS))} |")
    return "\n".join(lines)


def _cells(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[str]:
    by_row = [row_scores(row) for row in rows]
    values = {score: [value for row in by_row if (value := row[score]) is not None] for score in scores}
    return [mean_and_std(values[score], COLUMNS[score][1]) for score in scores]


def write_choices(readme: Path, results: Path) -> None:
    """Write the tables of all results files in ``results`` into the section ``held-out`` of the README.

    A file whose rows include variants has a table of these too. Without files the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
    if contents:
        with_variants = [content for content in contents if any("variant" in row for row in content["rows"])]
        tables = [choices_table(contents), *(f"`{content['name']}`:\n\n{variants_table(content)}" for content in with_variants)]
        write_section(readme, "held-out", "\n\n".join(tables))
