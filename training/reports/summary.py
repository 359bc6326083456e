"""Scores for tables and charts, computed from the metrics of a comparison."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

DISPLAY_NAMES = {
    "concord": "Concord",
    "digits-full-spread": "Concord, all of the noise",
    "jmvae": "JMVAE-kl",
    "mvae": "MVAE",
    "mmvae": "MMVAE",
    "mopoe": "MoPoE",
    "mvtcae": "MVTCAE",
    "mvtcae-beta-3": "MVTCAE, β 3",
    "jnf": "JNF",
    "contrastive": "Contrastive",
}

LOWER_IS_BETTER = {"frechet", "minutes"}
NOT_RANKED = {"coherence_one", "coherence_more", "coherence_joint", "log_likelihood", "log_likelihood_best", "minutes"}
"""Scores whose best value is not marked: the noise of samples and the looseness of a bound can differ between models, and the
machine had other jobs."""

Rows = Sequence[Mapping[str, Any]]


def row_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row's variant, or of its model if it is not a variant."""
    return str(row.get("variant") or row["model"])


def display_name(name: str) -> str:
    """Return the name of a model or variant in tables and charts."""
    return DISPLAY_NAMES.get(name, name)


def finished_rows(content: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Return the rows with status done by name: those of ``DISPLAY_NAMES`` in its order, then the others in file order."""
    names = dict.fromkeys([*DISPLAY_NAMES, *map(row_name, content["rows"])])
    by_name = [(n, [row for row in content["rows"] if row_name(row) == n and row["status"] == "done"]) for n in names]
    return [(name, rows) for name, rows in by_name if rows]


def average(rows: Rows, score: str) -> tuple[float | None, float | None]:
    """Return mean and standard deviation of a score over rows.

    The mean is None if a row lacks the score. The deviation of a single row is None.
    """
    values = [value for row in rows if (value := row_scores(row)[score]) is not None]
    if len(values) < len(rows) or not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def row_scores(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores of one model and seed.

    ``probe``: mean over single modalities, ``probe_two``: over pairs. ``coherence_one``, ``coherence_more``: mean over targets
    and over sources of one or of multiple modalities, of one sample of the posterior. ``means_one``, ``means_more``: the same
    of the mean of the posterior, which needs no noise. ``coherence_joint``: of samples of the prior. ``frechet``: mean over
    images and single sources. ``cosine``: mean over modalities of matched minus shuffled. ``log_likelihood``: log p(X) in nats,
    with samples of the model's posterior, ``log_likelihood_best`` with those of the best Gaussian of each row. Rows of held-out
    rows lack both, and ``gap_closed``.
    """
    distances, bounds = row["frechet"], row.get("log_likelihood", {})
    return {
        "probe": _mean([v for name, v in row.get("probe", {}).items() if "+" not in name and name != "joint"]),
        "probe_two": _mean([v for name, v in row.get("probe", {}).items() if name.count("+") == 1]),
        "coherence_one": mean_coherence(row, multimodal=False),
        "coherence_more": mean_coherence(row, multimodal=True),
        "means_one": mean_coherence(row, multimodal=False, kind="cross_means"),
        "means_more": mean_coherence(row, multimodal=True, kind="cross_means"),
        "coherence_joint": row["coherence"]["joint"],
        "frechet": _mean([v for s, by_image in distances.items() if "+" not in s and s != "prior" for v in by_image.values()]),
        "cosine": _mean([v["matched"] - v["shuffled"] for v in row["cosine"].values()]),
        "gap_closed": row.get("gap_closed"),
        "log_likelihood": bounds.get("joint"),
        "log_likelihood_best": bounds.get("best"),
        "minutes": row["seconds"] / 60,
    }


def mean_coherence(row: Mapping[str, Any], *, multimodal: bool, kind: str = "cross") -> float | None:
    """Return the mean coherence over targets and over sources of multiple modalities, or of one.

    Args:
        kind: ``cross``, of one sample of the posterior, or ``cross_means``, of its mean.
    """
    cross = row["coherence"].get(kind, {})
    return _mean([v for source, by_target in cross.items() if ("+" in source) == multimodal for v in by_target.values()])


def rename_old_keys(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under their current keys.

    Manifests of older bundles, and result and evaluation files of older runs, have ``judges`` for ``classifier_accuracy``.
    """
    return {"classifier_accuracy" if key == "judges" else key: value for key, value in metrics.items()}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
