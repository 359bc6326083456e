"""The few scores that tables and charts show, out of all figures of a comparison."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "concord": "Concord",
    "jmvae": "JMVAE-kl",
    "mvae": "MVAE",
    "mmvae": "MMVAE",
    "mopoe": "MoPoE",
    "mvtcae": "MVTCAE",
    "jnf": "JNF",
}

Rows = Sequence[Mapping[str, Any]]


def name_of(row: Mapping[str, Any]) -> str:
    """Of a row: its variant's, or its model's."""
    return str(row.get("variant") or row["model"])


def title_of(name: str) -> str:
    """What tables and charts call a model or a variant."""
    return TITLES.get(name, name)


def finished(content: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows that are done, by name: models in the order of ``TITLES``, then variants as they come."""
    names = dict.fromkeys([*TITLES, *map(name_of, content["rows"])])
    by_name = [(n, [row for row in content["rows"] if name_of(row) == n and row["status"] == "done"]) for n in names]
    return [(name, rows) for name, rows in by_name if rows]


def average(rows: Rows, score: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a score over rows; None where a row lacks it, no deviation of one row."""
    values = [value for row in rows if (value := scores(row)[score]) is not None]
    if len(values) < len(rows) or not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scores(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of one model and seed.

    ``probe``: mean over the single modalities. ``coherence_one``, ``coherence_more``: mean over targets and sources of one, of
    several modalities, sampled at temperature 1; ``coherence_joint``: from the prior. ``frechet``: mean over images and single
    sources. ``cosine``: mean over modalities, what the shuffled control has taken off. ``log_likelihood``: log p(X) in nats.
    """
    distances = row["frechet"]
    return {
        "probe": _mean([v for name, v in row.get("probe", {}).items() if "+" not in name and name != "joint"]),
        "coherence_one": coherence(row, several=False),
        "coherence_more": coherence(row, several=True),
        "coherence_joint": row["coherence"]["joint"],
        "frechet": _mean([v for s, of in distances.items() if "+" not in s and s != "prior" for v in of.values()]),
        "cosine": _mean([v["matched"] - v["shuffled"] for v in row["cosine"].values()]),
        "gap_closed": row["gap_closed"],
        "log_likelihood": row["log_likelihood"]["joint"],
        "minutes": row["seconds"] / 60,
    }


def coherence(row: Mapping[str, Any], *, several: bool) -> float | None:
    """Mean over targets and over sources of one or of several modalities, of what one sample shows."""
    cross = row["coherence"]["cross"]
    return _mean([share for source, of in cross.items() if ("+" in source) == several for share in of.values()])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
