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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from concord.model import bundle
from tests.benchmarks import overhead, report, scaling, workers
from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.plan import CONNECTIONS, FULL, QUICK, Plan
from tests.benchmarks.process import GENERATOR_CORE, SERVER_CORE
from tests.benchmarks.rounds import Figures, measure, measure_one_connection, saturate, verify_same_embeddings
from tests.benchmarks.servers import COMPETITORS, CONCORD, PLAIN, SERVERS, Server
from tests.support.traffic import Connections

Variants = dict[str, dict[str, str]]
"""The settings of each server, by its name."""


def main(
    quick: Annotated[
        bool, typer.Option(help="Take minutes instead of half an hour, and leave the documents as they are.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds instead of 5, or of 1 with --quick.")] = None,
) -> None:
    """Measure all servers, print the tables and write the results."""
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
    for server in COMPETITORS:
        server.interpreter()
    if plan.scaling:
        with _timed("bundles"):
            scaling.export_bundles()
    content: dict[str, Any] = {
        "command": f"make bench{' QUICK=1' if quick else ''}{f' ROUNDS={rounds}' if rounds else ''}",
        "bundle": describe_bundle(),
        "machine": describe_machine(),
    }
    with _timed("same embeddings"):
        content["largest_difference"] = compare_embeddings()
    with _timed("variants"):
        chosen, chosen_for_one, content["variants"] = choose_variants(plan)
    content["chosen"], content["chosen_for_one"] = chosen, chosen_for_one
    content["rounds"] = run_rounds(plan, chosen, chosen_for_one)
    with _timed("overhead"):
        content["inside"] = overhead.measure(plan)
    with _timed("workers"):
        content["workers"] = workers.measure(plan, cores)
    if plan.scaling:
        with _timed("scaling"):
            content["scaling"] = scaling.measure(plan)
    content["minutes"] = round((time.monotonic() - began) / 60, 1)
    report.RESULTS.mkdir(exist_ok=True)
    file = report.RESULTS / "quick.json" if quick else report.LATEST
    file.write_text(json.dumps(content, indent=1) + "\n")
    if not quick:
        scaling.plot(content["scaling"], report.RESULTS)
        report.write(content)
    print(report.benchmark_section(content))


def compare_embeddings() -> float:
    """Return the largest difference between the embeddings of any server and Concord's. The no-op route has none."""
    with ExitStack() as stack:
        running = {
            server.name: (server, stack.enter_context(server.running(server.variants[0])))
            for server in (CONCORD, PLAIN, *COMPETITORS)
        }
        return uvloop.run(verify_same_embeddings(running, [*photo_items()[:4], *word_items()[:2]]))


def choose_variants(plan: Plan) -> tuple[Variants, Variants, dict[str, list[dict[str, Any]]]]:
    """Measure every variant of the competitors and of plain FastAPI.

    Returns:
        the variant of each server with the highest geometric mean of the throughputs at 16 and 64 connections; the variant with
        the highest throughput at 1 connection, of those that batch, or of all if the server does not batch; and the throughputs
        of all variants.
    """
    chosen: Variants = {server.name: dict(server.variants[0]) for server in SERVERS}
    chosen_for_one = dict(chosen)
    measured: dict[str, list[dict[str, Any]]] = {}
    if not plan.tune:
        return chosen, chosen_for_one, measured
    for server in (*COMPETITORS, PLAIN):
        variants = measured[server.name] = []
        for variant in server.variants:
            with server.running(variant) as process:
                rates = uvloop.run(_saturate(server, process.port, plan.tune))
            variants.append({"variant": dict(variant), **{name: round(rate, 1) for name, rate in rates.items()}})
        fastest = max(variants, key=lambda entry: math.prod(entry[f"rps_{clients}"] for clients in CONNECTIONS[1:]))
        batching = [entry for entry in variants if int(entry["variant"].get("BATCH", "2")) > 1]
        chosen[server.name] = fastest["variant"]
        chosen_for_one[server.name] = max(batching, key=lambda entry: float(entry["rps_1"]))["variant"]
    return chosen, chosen_for_one, measured


async def _saturate(server: Server, port: int, seconds: float) -> Figures:
    requests = server.requests(photo_items())
    async with Connections(port) as connections:
        await saturate(connections, requests, seconds / 3)
        return await saturate(connections, requests, seconds)


def run_rounds(plan: Plan, chosen: Variants, chosen_for_one: Variants) -> dict[str, list[Figures]]:
    """Return the figures of each server in each round.

    The rounds are interleaved: each measures all servers, and starts with another one. Figures at one connection are those of
    ``chosen_for_one``.
    """
    rounds: dict[str, list[Figures]] = {server.name: [] for server in SERVERS}
    for number in range(plan.rounds):
        first = number % len(SERVERS)
        for server in SERVERS[first:] + SERVERS[:first]:
            name = server.name
            with _timed(f"round {number + 1}: {server.title}"):
                with server.running(chosen[name]) as process:
                    figures = uvloop.run(measure(server, process, plan, photo_items(), word_items()))
                if chosen_for_one[name] != chosen[name]:
                    with server.running(chosen_for_one[name]) as process:
                        figures |= uvloop.run(measure_one_connection(server, process, plan, photo_items()))
                rounds[name].append(figures)
    return rounds


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


@contextmanager
def _timed(name: str) -> Iterator[None]:
    """Log the duration of the context to stderr."""
    began = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
