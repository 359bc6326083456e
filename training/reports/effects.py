"""What refinement and the alignment to a teacher change, each with and without the other: a 2 x 2 over equal seeds."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concord.training.evaluation.requests import request_scores
from concord.training.reports.summary import row_name, row_scores
from concord.training.reports.tables import mean_and_std, pair_scores, write_section

VARIANTS = ("concord", "unrefined", "unaligned", "neither")
"""The model; without refinement of the teacher; without a teacher; without both."""
_FAMILIES = ("recall@10", "accuracy", "mean average precision", "R²")
DIGITS = {"digits-gaussian": "concord", **{f"digits-{name}": name for name in VARIANTS[1:]}}
"""Variants of digits. The first is the configuration that the others extend."""
REGIMES = {
    "digits-gaussian": "digits-unrefined",
    "digits-beta-3": "digits-beta-3-unrefined",
    "digits-latent-8": "digits-latent-8-unrefined",
    "digits-narrow": "digits-narrow-unrefined",
}
"""Variants of digits, and the same without refinement of the teacher."""
Scores = Mapping[str, float]
"""By title."""


def effects_table(runs: Mapping[str, Sequence[Scores]]) -> str:
    """Return a Markdown table of the means of the scores, and of the differences of equal seeds.

    Differences are means over seeds, with their standard deviation.

    Args:
        runs: the scores of each of ``VARIANTS``, for the same seeds in the same order.
    """
    header = [
        "Concord",
        "no refinement",
        "no teacher",
        "neither",
        "refinement, with a teacher",
        "refinement, without one",
        "a teacher, with refinement",
    ]
    lines = [f"| | {' | '.join(header)} |", f"| --- |{' --- |' * len(header)}"]
    for title in runs["concord"][0]:
        if not all(title in scores for by_seed in runs.values() for scores in by_seed):
            continue
        values = {name: [scores[title] for scores in by_seed] for name, by_seed in runs.items()}
        cells = [_number(title).format(statistics.fmean(values[name])) for name in VARIANTS]
        for one, other in (("concord", "unrefined"), ("unaligned", "neither"), ("concord", "unaligned")):
            differences = [a - b for a, b in zip(values[one], values[other], strict=True)]
            cells.append(mean_and_std(differences, _difference(title)))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def regimes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of what refinement of the teacher changes in each of ``REGIMES``, over equal seeds.

    Args:
        rows: of a comparison. Regimes without rows that are done are left out.
    """
    scores: dict[str, dict[int, Scores]] = {}
    for row in rows:
        if row["status"] == "done":
            scores.setdefault(row_name(row), {})[row["seed"]] = class_scores(row)
    lines: list[str] = []
    for refined, unrefined in REGIMES.items():
        if not (seeds := sorted(scores.get(refined, {}).keys() & scores.get(unrefined, {}).keys())):
            continue
        titles = [title for title in scores[refined][seeds[0]] if "best proposal" not in title]  # few rows have it
        if not lines:
            lines = [f"| | seeds | {' | '.join(titles)} |", f"| --- | --- |{' --- |' * len(titles)}"]
        cells = [
            mean_and_std([scores[refined][seed][title] - scores[unrefined][seed][title] for seed in seeds], _difference(title))
            for title in titles
        ]
        lines.append(f"| `{refined}` | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def effect_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of one model by title, each with the direction in which it is better.

    A score is the mean over all pairs of single modalities that have it, or over all single modalities.

    Args:
        evaluation: figures of ``evaluate``.
    """
    of_pairs = {title: value for title, (value, *_) in pair_scores(evaluation).items() if " others" not in title}
    scores = {}
    for family in _FAMILIES:
        values = [value for title, value in of_pairs.items() if title.endswith(f", {family}")]
        if values:
            scores[f"{family} ↑"] = statistics.fmean(values)
    if probes := [value for title, value in of_pairs.items() if title.startswith("probe of ") and title != "probe of joint"]:
        scores["probe ↑"] = statistics.fmean(probes)
    distances = [
        metrics["frechet_efficientnet"]
        for target, sources in evaluation.get("pictures", {}).items()
        for source, metrics in sources.items()
        if source not in (target, "others", "prior", "training") and "frechet_efficientnet" in metrics
    ]
    if distances:
        scores["FD of pictures ↓"] = statistics.fmean(distances)
    if by_step := request_scores(evaluation).get("log-likelihood, nats, from 1 modality"):
        scores["log-likelihood of what is absent, from one modality, nats ↑"] = by_step[0]
    if refinement := evaluation.get("refinement"):
        scores["ELBO of the joint posterior, weighted nats ↑"] = refinement["elbo_joint"]
        scores["ELBO of the aligned posterior, weighted nats ↑"] = refinement["elbo_before"]
    return scores


def class_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a row of a comparison of models with ``pairing = "class"``, by title, as ``effect_scores`` does."""
    scores = row_scores(row)
    titles = {
        "probe": "probe ↑",
        "means_one": "coherence of means, from one modality ↑",
        "means_more": "coherence of means, from more ↑",
        "coherence_one": "coherence of samples, from one modality ↑",
        "coherence_more": "coherence of samples, from more ↑",
        "frechet": "FD of pictures ↓",
        "cosine": "cosine ↑",
        "log_likelihood": "log p(X), nats ↑",
        "log_likelihood_best": "log p(X), best proposal, nats ↑",
    }
    return {title: value for name, title in titles.items() if (value := scores[name]) is not None}


def _number(title: str) -> str:
    """Return the number format of a score."""
    return "{:.1f}" if "nats" in title or "FD" in title else "{:.3f}"


def _difference(title: str) -> str:
    """Return the number format of a difference of scores."""
    return _number(title).replace(":", ":+")


def write_regimes(readme: Path, comparison: Path) -> None:
    """Write the table of ``REGIMES`` of a results file into the section ``regimes`` of the README.

    Without the file the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    if comparison.exists():
        write_section(readme, "regimes", regimes_table(json.loads(comparison.read_text())["rows"]))


def write_effects(readme: Path, results: Path) -> None:
    """Write the tables of all comparisons of ``VARIANTS`` in ``results`` into the section ``effects`` of the README.

    With ``pairing = "row"``, ``compare`` writes a folder with concord-<seed>.json and, for the other variants,
    <configuration>-<variant>-<seed>.json. With ``pairing = "class"`` it writes one file, whose variants are those of
    ``DIGITS``. Without any the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    blocks = []
    for path in sorted(results.iterdir()):
        runs = _of_folder(path) if path.is_dir() else _of_comparison(path) if path.suffix == ".json" else {}
        seeds = sorted(set.intersection(*map(set, runs.values()))) if len(runs) == len(VARIANTS) else []
        if seeds:
            table = effects_table({name: [by_seed[seed] for seed in seeds] for name, by_seed in runs.items()})
            number = "seed" if len(seeds) == 1 else "seeds"
            blocks.append(f"`{path.stem}`, {number} {', '.join(map(str, seeds))}:\n\n{table}")
    if blocks:
        write_section(readme, "effects", "\n\n".join(blocks))


def _of_folder(folder: Path) -> dict[str, dict[int, Scores]]:
    """Return the scores of each of ``VARIANTS`` by seed."""
    config = re.sub(r"-\d+$", "", folder.name)  # without the rows per epoch of a reduced budget
    found: dict[str, dict[int, Scores]] = {}
    for variant in VARIANTS:
        name = variant if variant == "concord" else f"{config}-{variant}"
        for file in folder.glob(f"{name}-*.json"):
            found.setdefault(variant, {})[int(file.stem.removeprefix(f"{name}-"))] = effect_scores(json.loads(file.read_text()))
    return found


def _of_comparison(file: Path) -> dict[str, dict[int, Scores]]:
    """Return the scores of each of ``VARIANTS`` by seed."""
    found: dict[str, dict[int, Scores]] = {}
    for row in json.loads(file.read_text())["rows"]:
        if row["status"] == "done" and (variant := DIGITS.get(row_name(row))):
            found.setdefault(variant, {})[row["seed"]] = class_scores(row)
    return found
