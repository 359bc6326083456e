"""``python -m tests.benchmarks``: compare the service with other inference servers on this machine.

The server runs on one core and the load generator on another. A full run writes ``results/latest.json``, the scaling figure and
the tables of both README files; ``--quick`` writes ``results/quick.json`` only.
"""

import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from subprocess import CalledProcessError
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from concord.model import bundle
from tests.benchmarks import overhead, report, scaling, workers
from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.plan import CONNECTIONS, FULL, QUICK, Plan
from tests.benchmarks.process import GENERATOR_CORE, SERVER_CORE
from tests.benchmarks.rounds import embeddings_of, measure, verify_same_embeddings
from tests.benchmarks.servers import COMPETITORS, CONCORD, NOOP, SERVERS, Server

SHOWN = 100
"""Characters of an error in the results, at its start and at its end."""
Variant = Mapping[str, str]
"""Settings of a server, as environment variables."""


def main(
    quick: Annotated[bool, typer.Option(help="Take minutes instead of an hour, and leave the documents as they are.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds instead of 5, or of 1 with --quick.")] = None,
) -> None:
    """Measure all servers, print the tables and write the results. What fails is left out and named."""
    cores = sorted(os.sched_getaffinity(0))
    if not {SERVER_CORE, GENERATOR_CORE} <= {*cores}:
        raise SystemExit(
            f"this process may use the cores {cores}; the benchmark needs core {SERVER_CORE} for the "
            f"server and core {GENERATOR_CORE} for the load generator"
        )
    os.sched_setaffinity(0, {GENERATOR_CORE})
    gc.disable()  # a pause of the generator would look like a pause of the server
    plan = QUICK if quick else FULL
    plan = replace(plan, rounds=rounds or plan.rounds)
    began = time.monotonic()
    parts = Parts()
    with parts.run("bundles of the scaling figure"):
        scaling.export_bundles()
    content: dict[str, Any] = {
        "command": f"make bench{' QUICK=1' if quick else ''}{f' ROUNDS={rounds}' if rounds else ''}",
        "bundle": describe_bundle(),
        "machine": describe_machine(),
        "failures": parts.failures,
        "inside": {},
    }
    servers, content["largest_difference"] = same_servers(SERVERS, parts)
    content["variants"] = run_rounds(servers, plan, parts)
    content["chosen"] = {name: choose_variant(variants) for name, variants in content["variants"].items()}
    content["rounds"] = {
        name: next(entry["rounds"] for entry in variants if entry["variant"] == content["chosen"][name])
        for name, variants in content["variants"].items()
    }
    if not content["rounds"][CONCORD.name]:
        raise RuntimeError(f"no round has figures of Concord: {parts.failures}")
    with parts.run("overhead"):
        content["inside"] = overhead.measure(plan)
    with parts.run("workers"):
        content["workers"] = workers.measure(plan, cores)
    report.RESULTS.mkdir(exist_ok=True)
    with parts.run("scaling"):
        content["scaling"] = scaling.measure(plan)
    content["minutes"] = round((time.monotonic() - began) / 60, 1)
    file = report.RESULTS / "quick.json" if quick else report.LATEST
    file.write_text(json.dumps(content, indent=1) + "\n")
    if not quick:
        report.write(content)
    print(report.benchmark_section(content))


class Parts:
    """Runs the parts of the benchmark, so that a part that fails does not lose the others.

    Attributes:
        failures: a line for each part that failed.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Log the duration of the context to stderr. An error ends the context and is added to ``failures``."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # of other people's servers
            output = (
                f" {error.stderr.decode(errors='replace')}" if isinstance(error, CalledProcessError) and error.stderr else ""
            )
            reason = " ".join(f"{type(error).__name__}: {error}{output}".split())
            shown = reason if len(reason) <= 2 * SHOWN else f"{reason[:SHOWN]} … {reason[-SHOWN:]}"
            self.failures.append(f"{name}: {shown}")
            print(f"{name} failed: {reason}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def same_servers(servers: Sequence[Server], parts: Parts) -> tuple[list[Server], float]:
    """Return the servers that start and whose embeddings are Concord's, and the largest difference. The no-op route has none.

    Raises:
        RuntimeError: Concord does not start.
    """
    items = [*photo_items()[:4], *word_items()[:2]]
    same: list[Server] = []
    largest, reference = 0.0, None
    for server in servers:
        with parts.run(f"{server.title}: same embeddings"), server.running(server.variants[0]) as process:
            if server.name != NOOP.name:
                embeddings = uvloop.run(embeddings_of(server, process.port, items))
                reference = embeddings if reference is None else reference
                largest = max(largest, verify_same_embeddings(embeddings, reference))
            same.append(server)
        if server.name == CONCORD.name and reference is None:
            raise RuntimeError(f"Concord does not start: {parts.failures}")
    return same, largest


def run_rounds(servers: Sequence[Server], plan: Plan, parts: Parts) -> dict[str, list[dict[str, Any]]]:
    """Return each variant of each server, with its figures in each round that it did not fail.

    The rounds are interleaved: each measures every variant of every server, and starts with another one.
    """
    variants: dict[str, list[dict[str, Any]]] = {
        server.name: [{"variant": dict(variant), "rounds": []} for variant in server.variants] for server in servers
    }
    runs = [(server, entry) for server in servers for entry in variants[server.name]]
    for number in range(plan.rounds):
        first = number * len(runs) // plan.rounds
        for server, entry in runs[first:] + runs[:first]:
            name = f"round {number + 1}: {server.title} {' '.join(f'{key}={value}' for key, value in entry['variant'].items())}"
            with parts.run(name.rstrip()), server.running(entry["variant"]) as process:
                entry["rounds"].append(uvloop.run(measure(server, process, plan, photo_items(), word_items())))
    return variants


def choose_variant(variants: Sequence[Mapping[str, Any]]) -> Variant:
    """Return the variant with the highest geometric mean of the throughputs at 16 and 64 connections, medians of its rounds.

    Args:
        variants: of one server. One that failed in a round is chosen only if all did.
    """
    most = max(len(entry["rounds"]) for entry in variants)

    def throughput(entry: Mapping[str, Any]) -> float:
        if not most or len(entry["rounds"]) < most:
            return 0.0
        return math.prod(float(np.median([figures[f"rps_{n}"] for figures in entry["rounds"]])) for n in CONNECTIONS[1:])

    chosen: Variant = max(variants, key=throughput)["variant"]
    return chosen


def describe_bundle() -> dict[str, str]:
    """Return name and SHA-256 of the bundle that all servers serve. The service reports the same hash."""
    opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
    return {"name": opened.manifest.name, "sha256": opened.sha256}


def describe_machine() -> dict[str, Any]:
    """Return the processor, the system and the versions of the software."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    libraries = ("fastapi", "numpy", "onnxruntime", "orjson", "pillow", "starlette", "torch", "uvicorn", "uvloop")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(names),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "competitors": [package for server in COMPETITORS for package in server.packages],
        "threads": 1,
    }


if __name__ == "__main__":
    typer.run(main)
