"""The results in Markdown: a short table in README.md, all rows and targets in tests/benchmarks/README.md; and the figure.

``python -m tests.benchmarks.report`` writes all from ``results/latest.json`` without a measurement. What a run did not measure
is left out.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import scaling
from tests.benchmarks.plan import CONNECTIONS, LIMIT_MS
from tests.benchmarks.scaling import FIGURE
from tests.benchmarks.servers import COMPETITORS, CONCORD, NOOP, PLAIN, SERVERS
from tests.support.documents import with_section
from tests.support.server import ROOT

Content = Mapping[str, Any]
"""A results file."""
Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""The figures of each server in each round."""

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
LATEST = RESULTS / "latest.json"
README, README_MARKER = ROOT / "README.md", "performance"
BENCHMARK_README, BENCHMARK_MARKER = FOLDER / "README.md", "benchmark"
PROFILE, PROFILE_MARKER = RESULTS / "profile.json", "profile"
SHORT_TABLE = ("rps_16", "rps_64", "p50_1_ms", "p99_at_400_ms", "resident_mb")
"""Figures in README.md."""
MAX_LOAD = 2.5
"""Load average of a machine on which only the benchmark runs."""
P50_BOUND = 0.5
"""Largest ratio of Concord's median latency at 1 connection to that of the best competitor."""
_PERCENTILE = re.compile(r"p\d+_at_(\d+)_ms")


@dataclass(frozen=True)
class Target:
    """A bound on a figure of Concord.

    Attributes:
        name: unique among the targets.
        measured: an absolute figure, or a ratio within one run.
        at_least: the bound is a minimum, else a maximum.
        form: format of the two values.
        note: shown after the name in the table of targets.
    """

    name: str
    measured: float
    bound: float
    at_least: bool
    form: str = "{:.2f}"
    note: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> str:
        """Return the row of the table of targets."""
        sign = "≥" if self.at_least else "≤"
        result = "met" if self.met else f"missed by {abs(self.measured / self.bound - 1):.0%}"
        name = f"{self.name} ({self.note})" if self.note else self.name
        return f"| {name} | {sign} {self.form.format(self.bound)} | {self.form.format(self.measured)} | {result} |"


def performance_section(content: Content) -> str:
    """Return the section of README.md: a short table, and the number of targets that were missed."""
    all_targets = targets(content)
    missed = sum(not target.met for target in all_targets)
    summary = f"{missed} of {len(all_targets)} targets were missed" if missed else f"all {len(all_targets)} targets were met"
    return "\n".join(
        [
            f"On a CPU ({content['machine']['processor']}), one core for the server and one for the load generator. One photo "
            f"per request, medians of {_count_rounds(content)}, in brackets the ratio to Concord; {_bundle(content)}.",
            "",
            *table(content, SHORT_TABLE, spread=False),
            "",
            f"[All rows, the targets and the method](tests/benchmarks/README.md): {summary}.",
        ]
    )


def benchmark_section(content: Content) -> str:
    """Return the section of tests/benchmarks/README.md: all rows, all targets, and how they were measured."""
    machine = content["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    lines = [
        f"`{content['command']}` measured these figures in {content['minutes']} minutes.",
        "",
        f"- Machine: {machine['processor']} (CPU only), {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}.",
        f"- Model: {_bundle(content)}; {machine['threads']} ONNX Runtime thread.",
        f"- Largest difference between Concord's embeddings and those of another server: {content['largest_difference']:.1e}.",
        f"- Versions: {libraries}; competitors: {', '.join(f'`{package}`' for package in machine['competitors'])}.",
        f"- Rounds: {_count_rounds(content)}.",
        *_settings(content),
        *(f"- Failed: {failure}." for failure in content.get("failures", ())),
        "",
        *table(content, limit=True),
        *request_table(content),
        *variants_table(content),
        *workers_table(content),
        "",
        "| target | required | measured | result |",
        "| --- | --- | --- | --- |",
        *(target.row() for target in targets(content)),
    ]
    if "scaling" in content:
        lines += [
            "",
            "Throughput and memory against worker processes, batch size, latent size, modalities and refinement steps: "
            f"[{FIGURE}](results/{FIGURE}).",
        ]
    return "\n".join(lines)


def table(content: Content, names: Iterable[str] | None = None, *, spread: bool = True, limit: bool = False) -> list[str]:
    """Return the lines of a table with a row for each figure and a column for each server.

    Args:
        content: the results.
        names: of the figures. None: all figures.
        spread: whether cells show half the interquartile range of the rounds.
        limit: whether a last column shows ``composed_limits``.
    """
    rounds: Rounds = content["rounds"]
    titles = _titles(rounds[CONCORD.name][0])
    limits = composed_limits(content) if limit else {}
    heads = [*(server.title for server in SERVERS), *(["composed limit"] if limit else [])]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name in titles if names is None else names:
        title, form = titles[name]
        concord = median(rounds, CONCORD.name, name)
        cells = []
        for server in SERVERS:
            values = np.array([figures[name] for figures in rounds.get(server.name, ()) if name in figures])
            if not len(values):
                cells.append("")
                continue
            middle, low, high = np.quantile(values, (0.5, 0.25, 0.75))
            deviation = f" ± {form.format((high - low) / 2)}" if spread and len(values) > 1 else ""
            ratio = f" ({middle / concord:.2f})" if server is not CONCORD and concord else ""
            failed = _failed_share(name, rounds[server.name])
            cells.append(f"{form.format(middle)}{deviation}{ratio}{f', {failed:.0%} failed' if failed > 0.001 else ''}")
        if limit:
            cells.append(f"{form.format(limits[name])} (Concord: {concord / limits[name]:.2f})" if name in limits else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def profile_section(profile: Content) -> str:
    """Return the tables of ``tests.benchmarks.profile``: shares of processor time by load, of operators, and memory."""
    loads: Mapping[str, Mapping[str, float]] = profile["loads"]
    parts = dict.fromkeys(part for shares in loads.values() for part in shares)
    lines = ["`python -m tests.benchmarks.profile` sampled the running threads of the service.", ""]
    if profile["load_average"] > MAX_LOAD:
        lines[0] += (
            f" The load average was {profile['load_average']:g}. Threads that wait for a core count as running, so the shares "
            "of system calls and of the other thread are too large."
        )
    lines += [f"| share of samples | {' | '.join(loads)} |", f"| --- |{' --- |' * len(loads)}"]
    for part in parts:
        cells = [f"{shares[part]:.0%}" if part in shares else "" for shares in loads.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines += ["", "| graph | largest operators, share of the time of its kernels |", "| --- | --- |"]
    for graph, shares in profile["operators"].items():
        lines.append(f"| {graph} | {', '.join(f'{name} {share:.0%}' for name, share in shares.items())} |")
    memory = profile["memory_mb"]
    parts_of_memory = ", ".join(f"{name} {size:.0f}" for name, size in memory.items())
    return "\n".join([*lines, "", f"Resident memory of a process, {sum(memory.values()):.0f} MB: {parts_of_memory}."])


def composed_limits(content: Content) -> dict[str, float]:
    """Return the throughput of a server that does the work of the no-op route and then that of parsing and encoding without a
    server, one after the other on one core, for each row of throughput: in batches of 32, and of one row at 1 connection."""
    rounds: Rounds = content["rounds"]
    inside = content["inside"]
    limits = {}
    for name in rounds[CONCORD.name][0]:
        match = re.fullmatch(r"(word_|wrk_)?rps_(\d+)|goodput_rps", name)
        if match is None:
            continue
        work = "raw_picture_rps" if match[2] == "1" else "raw_bulk_word_rps" if match[1] == "word_" else "raw_bulk_rps"
        noop = median(rounds, NOOP.name, name if match[2] else f"rps_{CONNECTIONS[-1]}")
        if work in inside and not math.isnan(noop):
            limits[name] = 1 / (1 / noop + 1 / float(np.median(inside[work])))
    return limits


def request_table(content: Content) -> list[str]:
    """Return the lines of the table of Concord's time for each request, and of its parts as other rows measure them; none if
    one of these was not measured."""
    rounds: Rounds = content["rounds"]
    limits = composed_limits(content)
    lines = [
        "",
        "Concord's microseconds for each request (1 / throughput). The rest is what the service adds: options and items, "
        "admission control, queue, scheduler, change of threads, metrics, response. It is negative where Concord skips "
        "encoders that the loop without a server runs:",
        "",
        "| | in all | no-op route | parsing and encoding without a server | rest |",
        "| --- | --- | --- | --- | --- |",
    ]
    titles = _titles(rounds[CONCORD.name][0])
    names = [name for name in titles if re.fullmatch(r"(word_)?rps_\d+", name) and name in limits]
    for name in names:
        total, noop = 1e6 / median(rounds, CONCORD.name, name), 1e6 / median(rounds, NOOP.name, name)
        work = 1e6 / limits[name] - noop
        title = titles[name][0].removeprefix("requests/s, ")
        lines.append(f"| {title} | {total:.0f} | {noop:.0f} | {work:.0f} | {total - noop - work:.0f} |")
    return lines if names else []


def variants_table(content: Content) -> list[str]:
    """Return the lines of the table of all variants of the competitors; none if a run has the figures of one variant only."""
    variants = {name: entries for name, entries in content.get("variants", {}).items() if len(entries) > 1}
    if not any("rounds" in entry for entries in variants.values() for entry in entries):
        return []
    titles = _titles(content["rounds"][CONCORD.name][0])
    names = [name for name in (*(f"rps_{n}" for n in CONNECTIONS), "word_rps_64", "p50_1_ms", "resident_mb") if name in titles]
    lines = [
        "",
        "All variants, in the same rounds. The first table has those in bold:",
        "",
        f"| variant | {' | '.join(titles[name][0] for name in names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    for server in SERVERS:
        for entry in variants.get(server.name, ()):
            title = f"{server.title} {' '.join(f'`{name}={value}`' for name, value in entry['variant'].items())}"
            if entry["variant"] == content["chosen"][server.name]:
                title = f"**{title}**"
            cells = [titles[name][1].format(median({"": entry["rounds"]}, "", name)) for name in names]
            lines.append(f"| {title} | {' | '.join(cells if entry['rounds'] else ['failed'] * len(names))} |")
    return lines


def workers_table(content: Content) -> list[str]:
    """Return the lines of the table of worker processes; none if they were not measured."""
    if not content.get("workers"):
        return []
    limits = composed_limits(content)
    lines = [
        "",
        "Worker processes, 64 connections, wrk. In brackets the ratio to 1 worker, and the share of the composed limit of as "
        "many cores. If wrk shares the cores, its processor time is subtracted:",
        "",
        "| workers | requests/s, a photo | requests/s, a word | CPU seconds per 1,000 photos | … words | resident memory, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count, rounds in content["workers"].items():
        cores = int(rounds[0].get("cores", int(count)))
        cells = []
        for name, form, limit in (
            ("photo_rps", "{:,.0f}", "wrk_rps_64"),
            ("word_rps", "{:,.0f}", "word_rps_64"),
            ("photo_cpu_s_per_1000", "{:.2f}", ""),
            ("word_cpu_s_per_1000", "{:.2f}", ""),
            ("resident_mb", "{:.0f}", ""),
        ):
            value = _workers(content, count, name)
            ratios = [f"{value / _workers(content, '1', name):.2f}"] if count != "1" and "1" in content["workers"] else []
            if limit in limits:
                ratios.append(f"limit: {value / (cores * limits[limit]):.2f}")
            cells.append(form.format(value) + (f" ({', '.join(ratios)})" if ratios else ""))
        lines.append(f"| {count}{'' if cores == int(count) else f' on {cores} cores'} | {' | '.join(cells)} |")
    return lines


def _workers(content: Content, count: str, name: str) -> float:
    return float(np.median([figures[name] for figures in content["workers"][count]]))


def targets(content: Content) -> list[Target]:
    """Return the targets with the measured values. Those of what was not measured are left out."""
    rounds: Rounds = content["rounds"]
    measured = {name: float(np.median(values)) for name, values in content["inside"].items()}
    inside = defaultdict(lambda: math.nan, measured)

    def concord(name: str) -> float:
        return median(rounds, CONCORD.name, name)

    def competitors(name: str) -> list[float]:
        values = [median(rounds, server.name, name) for server in COMPETITORS]
        return [value for value in values if not math.isnan(value)] or [math.nan]

    throughput = [
        Target(
            f"throughput at {clients} connections vs best competitor",
            concord(f"rps_{clients}") / max(competitors(f"rps_{clients}")),
            1.8,
            at_least=True,
        )
        for clients in CONNECTIONS[1:]
    ]
    throughput.append(
        Target(
            "throughput at 64 connections vs best competitor, a word",
            concord("word_rps_64") / max(competitors("word_rps_64")),
            4.0,
            at_least=True,
        )
    )
    if "2" in content.get("workers", {}):
        ratio = _workers(content, "2", "photo_rps") / _workers(content, "1", "photo_rps")
        throughput.append(Target("throughput of 2 workers on 2 cores vs 1 on 1", ratio, 1.85, at_least=True))
    latency = [
        Target(
            "p50 at 1 connection vs best competitor",
            concord("p50_1_ms") / min(competitors("p50_1_ms")),
            P50_BOUND,
            at_least=False,
        ),
        Target(
            "p50 at 1 connection vs FastAPI without batching",
            concord("p50_1_ms") / median(rounds, PLAIN.name, "p50_1_ms"),
            1.0,
            at_least=False,
        ),
        *(
            Target(
                f"{quantile} at 1000 requests/s vs FastAPI without batching",
                concord(f"{quantile}_at_1000_ms") / median(rounds, PLAIN.name, f"{quantile}_at_1000_ms"),
                1.0,
                at_least=False,
            )
            for quantile in ("p50", "p99")
        ),
    ]
    limits = composed_limits(content)
    overhead = [
        *(
            Target(
                f"{kind} throughput at 64 connections vs the composed limit",
                concord(name) / limits[name],
                0.9,
                at_least=True,
            )
            for kind, name in (("photo", "rps_64"), ("word", "word_rps_64"))
            if name in limits
        ),
        Target(
            "throughput of 32-item requests vs parsing and encoding without a server",
            inside["bulk_rps"] / inside["raw_bulk_rps"],
            0.8,
            at_least=True,
            note="can exceed 1: the loop without a server runs every encoder, Concord skips those of absent modalities",
        ),
        *(
            Target(
                f"refinement step of {rows} row{'s' if rows > 1 else ''} vs the graph alone",
                inside[f"step_{rows}_ms"] / inside[f"graph_step_{rows}_ms"],
                1.15,
                at_least=False,
            )
            for rows in (1, 32)
        ),
    ]
    refinement = [
        Target(
            "p99 of plain requests with 10% refined requests vs none",
            inside["mixed_p99_ms"] / inside["alone_p99_ms"],
            1.5,
            at_least=False,
            note="refined requests take 20 steps; with run-to-completion batches: "
            f"{inside['completion_p99_ms'] / inside['alone_p99_ms']:.2f}",
        ),
        Target(
            "4 refinement steps over HTTP vs PyTorch eager autograd",
            inside["four_steps_ms"] / inside["torch_eager_ms"],
            0.40,
            at_least=False,
        ),
        Target(
            "4 refinement steps of the graphs alone vs PyTorch eager autograd",
            inside["torch_graphs_ms"] / inside["torch_eager_ms"],
            0.35,
            at_least=False,
        ),
    ]
    resources = [
        Target("cold start, s", concord("cold_start_s"), 0.8, at_least=False),
        Target("resident memory, MB", concord("resident_mb"), 200.0, at_least=False, form="{:.0f}"),
    ]
    all_targets = [*throughput, *latency, *overhead, *refinement, *resources]
    return [target for target in all_targets if not math.isnan(target.measured)]


def median(rounds: Rounds, server: str, name: str) -> float:
    """Return the median of a figure of one server over the rounds that have it; NaN if none has it."""
    values = [figures[name] for figures in rounds.get(server, ()) if name in figures]
    return float(np.median(values)) if values else math.nan


def write(content: Content, readme: Path = README, benchmark_readme: Path = BENCHMARK_README, figures: Path = RESULTS) -> None:
    """Write the generated sections of the two documents, and the scaling figure into the folder ``figures``.

    Raises:
        AssertionError: a document lacks the markers of its section.
    """
    for document, marker, section in (
        (readme, README_MARKER, performance_section(content)),
        (benchmark_readme, BENCHMARK_MARKER, benchmark_section(content)),
    ):
        document.write_text(with_section(document.read_text(encoding="utf-8"), marker, section), encoding="utf-8")
    if "scaling" in content:
        scaling.plot(content["scaling"], content.get("workers", {}), figures)


def _count_rounds(content: Content) -> str:
    rounds = len(content["rounds"][CONCORD.name])
    return f"{rounds} interleaved rounds" if rounds > 1 else "1 round"


def _bundle(content: Content) -> str:
    if "bundle" not in content:
        return "the measured version of the built-in bundle is not recorded"
    return f"bundle `{content['bundle']['name']}`, SHA-256 `{content['bundle']['sha256'][:12]}…`"


def _settings(content: Content) -> list[str]:
    """Return list items with the variant of each server that has more than one."""

    def variants(key: str) -> str:
        return "; ".join(
            f"{server.title} {' '.join(f'`{name}={value}`' for name, value in content[key][server.name].items())}"
            for server in SERVERS
            if len(server.variants) > 1 and server.name in content[key]
        )

    return [f"- Settings: {variants('chosen')}."]


def _failed_share(name: str, rounds: Sequence[Mapping[str, float]]) -> float:
    """Return the largest share of failed requests in the open loop of a percentile, over the rounds; 0 for other figures."""
    match = _PERCENTILE.fullmatch(name)
    return max(figures[f"failed_at_{match[1]}"] for figures in rounds) if match else 0.0


def _titles(figures: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """Return the title and the number format of each row."""
    rates = dict.fromkeys(int(match[1]) for name in figures if (match := _PERCENTILE.fullmatch(name)))
    return {
        **{f"rps_{n}": (f"requests/s, {n} connection{'s' if n > 1 else ''}", "{:,.0f}") for n in CONNECTIONS},
        **{f"wrk_rps_{n}": (f"requests/s, {n} connections, wrk", "{:,.0f}") for n in CONNECTIONS if f"wrk_rps_{n}" in figures},
        **{f"word_rps_{n}": (f"requests/s, {n} connections, a word", "{:,.0f}") for n in CONNECTIONS[1:]},
        "p50_1_ms": ("p50 latency at 1 connection, ms", "{:.2f}"),
        **{f"{q}_at_{rate}_ms": (f"{q} latency at {rate} requests/s, ms", "{:.1f}") for rate in rates for q in ("p50", "p99")},
        "goodput_rps": (f"goodput: requests/s with p99 ≤ {LIMIT_MS} ms", "{:,.0f}"),
        "cpu_s_per_1000": ("CPU seconds per 1,000 requests", "{:.2f}"),
        "resident_mb": ("resident memory, MB", "{:.0f}"),
        "cold_start_s": ("cold start, s", "{:.2f}"),
    }


def write_profile(profile: Content, document: Path = BENCHMARK_README) -> None:
    """Write the generated section of the profiles."""
    text = with_section(document.read_text(encoding="utf-8"), PROFILE_MARKER, profile_section(profile))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_profile(json.loads(PROFILE.read_text()))
    write(json.loads(LATEST.read_text()))
