"""What was measured as Markdown: the table of everybody, and the targets with what was reached."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.contestants import ALL, NOOP, OURS, PEERS, PLAIN
from tests.benchmarks.plan import CONNECTIONS, LIMIT_MS

Content = Mapping[str, Any]

MARKERS = ("<!-- performance -->", "<!-- /performance -->")
_QUANTILE = re.compile(r"p\d+_at_(\d+)_ms")


@dataclass(frozen=True)
class Target:
    """``reached`` is a ratio within one run, or an absolute figure."""

    what: str
    reached: float
    wanted: float
    at_least: bool
    form: str = "{:.2f}"

    @property
    def met(self) -> bool:
        return self.reached >= self.wanted if self.at_least else self.reached <= self.wanted

    def row(self) -> str:
        sign = "≥" if self.at_least else "≤"
        by = abs(self.reached / self.wanted - 1)
        verdict = "met" if self.met else f"missed by {by:.0%}"
        return f"| {self.what} | {sign} {self.form.format(self.wanted)} | {self.form.format(self.reached)} | {verdict} |"


def section(content: Content) -> str:
    """Both tables and what they were measured on."""
    machine, rounds = content["machine"], len(content["rounds"][OURS.name])
    lines = [
        f"{machine['processor']}, server on one core and generator on another, {machine['threads']} thread; ONNX Runtime "
        f"{machine['libraries']['onnxruntime']}, {', '.join(machine['peers'])}. Medians of {rounds} interleaved round"
        f"{'s' if rounds > 1 else ''} (half the interquartile range), and ratios to the first column. One item a request: a "
        "photograph (PNG, base64), or a word where it says so. Each peer as it is quickest at 16 and 64 connections; at one "
        "connection, as it is quickest there and still batches. "
        f"`{content['command']}` wrote this in {content['minutes']} minutes.",
        "",
        *table(content),
        "",
        "| target | wanted | reached | |",
        "| --- | --- | --- | --- |",
        *(target.row() for target in targets(content)),
    ]
    if figures := content.get("figures"):
        lines += ["", f"How it scales: {', '.join(f'[{name}]({path})' for name, path in figures.items())}."]
    return "\n".join(lines)


def table(content: Content) -> list[str]:
    """A row for each figure, a column for each contestant."""
    rounds: Mapping[str, Sequence[Mapping[str, float]]] = content["rounds"]
    lines = [f"| | {' | '.join(one.title for one in ALL)} |", f"| --- |{' --- |' * len(ALL)}"]
    for name, (title, form) in _titles(rounds[OURS.name][0]).items():
        ours = median(rounds, OURS.name, name)
        cells = []
        for one in ALL:
            values = np.array([found[name] for found in rounds[one.name] if name in found])
            if not len(values):
                cells.append("")
                continue
            middle, low, high = np.quantile(values, (0.5, 0.25, 0.75))
            spread = f" ± {form.format((high - low) / 2)}" if len(values) > 1 else ""
            ratio = f" ({middle / ours:.2f})" if one is not OURS and ours else ""
            failed = _failed(name, rounds[one.name])
            cells.append(f"{form.format(middle)}{spread}{ratio}{f', {failed:.0%} failed' if failed > 0.001 else ''}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def targets(content: Content) -> list[Target]:
    """Each with what was reached."""
    rounds, inside = content["rounds"], {name: float(np.median(values)) for name, values in content["inside"].items()}

    def of(contestant: str, name: str) -> float:
        return median(rounds, contestant, name)

    def best(name: str, choose: Any) -> float:
        return float(choose(of(peer.name, name) for peer in PEERS))

    ours = OURS.name
    return [
        *(
            Target(
                f"throughput at {n} connections, of the best peer's", of(ours, f"rps_{n}") / best(f"rps_{n}", max), 2.0, True
            )
            for n in CONNECTIONS[1:]
        ),
        Target(
            "p50 at 1 connection, of the best batching peer's",
            of(ours, "p50_1_ms") / best("p50_1_ms", min),
            0.5,
            False,
        ),
        Target("p50 at 1 connection, of plain FastAPI's", of(ours, "p50_1_ms") / of(PLAIN.name, "p50_1_ms"), 1.15, False),
        *(
            Target(
                f"throughput at 64 connections, of a no-op route's ({kind})", of(ours, name) / of(NOOP.name, name), 0.6, True
            )
            for kind, name in (("photograph", "rps_64"), ("word", "word_rps_64"))
        ),
        Target("32 items, base64: of ONNX Runtime and decoding alone", inside["bulk_rps"] / inside["raw_bulk_rps"], 0.8, True),
        *(
            Target(
                f"a refinement step of {rows} row{'s' if rows > 1 else ''}, of the graph's call",
                inside[f"step_{rows}_ms"] / inside[f"graph_step_{rows}_ms"],
                1.15,
                False,
            )
            for rows in (1, 32)
        ),
        Target(
            f"p99 of requests without refinement where one in ten takes 20 steps, of theirs alone (to completion: "
            f"{inside['completion_p99_ms'] / inside['alone_p99_ms']:.2f})",
            inside["mixed_p99_ms"] / inside["alone_p99_ms"],
            2.0,
            False,
        ),
        Target(
            "4 refinement steps over HTTP, of PyTorch's eager autograd",
            inside["four_steps_ms"] / inside["torch_eager_ms"],
            0.35,
            False,
        ),
        Target("the same by the graphs alone", inside["torch_graphs_ms"] / inside["torch_eager_ms"], 0.35, False),
        Target("cold start, seconds", of(ours, "cold_start_s"), 2.0, False),
        Target("resident memory, MB", of(ours, "resident_mb"), 300.0, False, "{:.0f}"),
    ]


def median(rounds: Mapping[str, Sequence[Mapping[str, float]]], contestant: str, name: str) -> float:
    return float(np.median([found[name] for found in rounds[contestant] if name in found]))


def write(readme: Path, content: Content) -> None:
    """Put the section between the README's markers.

    Raises:
        ValueError: it has no such markers.
    """
    begin, end = MARKERS
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{readme}: lacks the markers {begin} and {end}")
    before, rest = text.split(begin, 1)
    readme.write_text(f"{before}{begin}\n{section(content)}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def _failed(name: str, rounds: Sequence[Mapping[str, float]]) -> float:
    """The largest share of requests that had no answer where this quantile was measured."""
    found = _QUANTILE.fullmatch(name)
    return max(one[f"failed_at_{found[1]}"] for one in rounds) if found else 0.0


def _titles(figures: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """What each row is called, and how its numbers are written."""
    rates = dict.fromkeys(int(found[1]) for name in figures if (found := _QUANTILE.fullmatch(name)))
    clients = CONNECTIONS[1:]
    return {
        **{f"rps_{n}": (f"requests/s, {n} connection{'s' if n > 1 else ''}", "{:,.0f}") for n in CONNECTIONS},
        **{f"word_rps_{n}": (f"requests/s, {n} connections, a word", "{:,.0f}") for n in clients},
        "p50_1_ms": ("p50 at 1 connection, ms", "{:.2f}"),
        **{f"{q}_at_{rate}_ms": (f"{q} at {rate} requests/s, ms", "{:.1f}") for rate in rates for q in ("p50", "p99")},
        "goodput_rps": (f"goodput: requests/s with p99 ≤ {LIMIT_MS} ms", "{:,.0f}"),
        "cpu_s_per_1000": ("CPU seconds per 1,000 requests", "{:.2f}"),
        "resident_mb": ("resident memory, MB", "{:.0f}"),
        "cold_start_s": ("cold start, s", "{:.2f}"),
    }
