"""``python -m tests.benchmarks``: the service beside what one would otherwise pick, on this machine, now.

The server has one core and the generator another. Writes ``results/latest.json`` and the README's table.
"""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from tests.benchmarks import inside, report, scaling
from tests.benchmarks.contestants import ALL, OURS, PEERS, PLAIN, Contestant
from tests.benchmarks.plan import CONNECTIONS, FULL, QUICK, Plan
from tests.benchmarks.process import GENERATOR_CORE, SERVER_CORE
from tests.benchmarks.rounds import assert_alike, measure, measure_alone, saturate
from tests.benchmarks.samples import pictures, words
from tests.server import ROOT
from tests.traffic import Connections

RESULTS = Path(__file__).parent / "results"
Variants = dict[str, dict[str, str]]


def main(
    quick: Annotated[bool, typer.Option(help="Minutes instead of half an hour; the README stays as it is.")] = False,
) -> None:
    """Compare, print the table and write it down."""
    if not {SERVER_CORE, GENERATOR_CORE} <= os.sched_getaffinity(0):
        raise SystemExit(f"cores {SERVER_CORE} and {GENERATOR_CORE} are needed, one for the server and one for the generator")
    os.sched_setaffinity(0, {GENERATOR_CORE})
    gc.disable()  # no pause of the generator may look like one of a server
    plan = QUICK if quick else FULL
    began = time.monotonic()
    for peer in PEERS:
        peer.python()
    if plan.scaling:
        with _step("bundles"):
            scaling.prepare()
    content: dict[str, Any] = {"command": f"make bench{' QUICK=1' if quick else ''}", "machine": machine()}
    with _step("answers"):
        content["largest_difference"] = alike()
    with _step("variants"):
        chosen, alone, content["variants"] = tune(plan)
    content["chosen"], content["chosen_for_one"] = chosen, alone
    content["rounds"] = compare(plan, chosen, alone)
    with _step("inside"):
        content["inside"] = inside.measure(plan)
    if plan.scaling:
        with _step("scaling"):
            content["scaling"] = scaling.measure(plan)
    content["minutes"] = round((time.monotonic() - began) / 60, 1)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / ("quick.json" if quick else "latest.json")
    file.write_text(json.dumps(content, indent=1) + "\n")
    if not quick:
        picture = scaling.draw(content["scaling"], RESULTS)
        content["figures"] = {"throughput and memory": picture.relative_to(ROOT).as_posix()}
        report.write(ROOT / "README.md", content)
    print(report.section(content))


def alike() -> float:
    """Everybody's answers to the same items, held against ours; those of the no-op route are none."""
    with ExitStack() as stack:
        up = {one.name: (one, stack.enter_context(one.running(one.variants[0]))) for one in (OURS, PLAIN, *PEERS)}
        return uvloop.run(assert_alike(up, [*pictures()[:4], *words()[:2]]))


def tune(plan: Plan) -> tuple[Variants, Variants, dict[str, list[dict[str, Any]]]]:
    """The variant of each contestant with the best geometric mean of its throughputs at several connections, that with the best
    at one among those that batch, if any does, and all that were tried."""
    chosen: Variants = {one.name: dict(one.variants[0]) for one in ALL}
    alone = dict(chosen)
    tried: dict[str, list[dict[str, Any]]] = {}
    if not plan.tune:
        return chosen, alone, tried
    for one in (*PEERS, PLAIN):
        tried[one.name] = []
        for variant in one.variants:
            with one.running(variant) as process:
                rates = uvloop.run(_saturate(one, process.port, plan.tune))
            tried[one.name].append({"variant": dict(variant), **{name: round(rate, 1) for name, rate in rates.items()}})
        best = max(tried[one.name], key=lambda found: float.__mul__(*[found[f"rps_{n}"] for n in CONNECTIONS[1:]]))
        batching = [found for found in tried[one.name] if int(found["variant"].get("BATCH", "2")) > 1]
        chosen[one.name] = best["variant"]
        alone[one.name] = max(batching, key=lambda found: float(found["rps_1"]))["variant"]
    return chosen, alone, tried


async def _saturate(contestant: Contestant, port: int, seconds: float) -> dict[str, float]:
    requests = contestant.requests(pictures())
    async with Connections(port) as connections:
        await saturate(connections, requests, seconds / 3)
        return await saturate(connections, requests, seconds)


def compare(plan: Plan, chosen: Variants, alone: Variants) -> dict[str, list[dict[str, float]]]:
    """The figures of each contestant in each round; who goes first changes from round to round. Those at one connection are of
    the variant that is best there."""
    rounds: dict[str, list[dict[str, float]]] = {one.name: [] for one in ALL}
    for number in range(plan.rounds):
        shift = number % len(ALL)
        for one in ALL[shift:] + ALL[:shift]:
            with _step(f"round {number + 1}: {one.title}"):
                with one.running(chosen[one.name]) as process:
                    found = uvloop.run(measure(one, process, plan, pictures(), words()))
                if alone[one.name] != chosen[one.name]:
                    with one.running(alone[one.name]) as process:
                        found |= uvloop.run(measure_alone(one, process, plan, pictures()))
                rounds[one.name].append(found)
    return rounds


def machine() -> dict[str, Any]:
    """What this ran on."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    libraries = ("fastapi", "numpy", "onnxruntime", "orjson", "pillow", "starlette", "torch", "uvicorn", "uvloop")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(names),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "peers": [package for peer in PEERS for package in peer.packages],
        "threads": 1,
    }


@contextmanager
def _step(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
