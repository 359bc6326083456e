"""The service against its own graphs: what the server adds to a step or to a batch, and what refinement does to neighbours."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import uvloop

from tests.benchmarks.contestants import OURS, Contestant
from tests.benchmarks.loops import bulk_items
from tests.benchmarks.plan import Plan
from tests.benchmarks.rounds import in_turn
from tests.benchmarks.samples import pictures
from tests.server import ROOT
from tests.traffic import Answer, Connections, closed, flow, post, quantiles

Told = dict[str, list[float]]

STEPS = 50
MIX_RATE = 200
COMPLETION = replace(OURS, name="completion", command=["-m", "tests.benchmarks.completion", "--port", "{port}"])
"""Ours, its batches run to completion."""


def measure(plan: Plan) -> Told:
    """Each figure once a repeat."""
    told: Told = {}
    for _ in range(plan.repeats):
        figures = {f"raw_{name}_rps": value for name, value in loop("raw", plan.probe).items()}
        figures |= {f"graph_step_{rows}_ms": 1000 * value for rows, value in loop("steps", plan.probe).items()}
        figures |= {f"torch_{name}_ms": 1000 * value for name, value in loop("torch", plan.probe).items()}
        for name, figure in {**figures, **uvloop_run(OURS, _served(plan)), **_mixes(plan)}.items():
            told.setdefault(name, []).append(figure)
    return told


def loop(name: str, seconds: float) -> dict[str, float]:
    """What ``tests.benchmarks.loops`` says."""
    command = [sys.executable, "-m", "tests.benchmarks.loops", name, str(seconds)]
    told: dict[str, float] = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    return told


def uvloop_run(contestant: Contestant, measuring: Any) -> dict[str, float]:
    """What this coroutine function finds out about a server of its own."""
    with contestant.running({}) as process:
        found: dict[str, float] = uvloop.run(measuring(process.port))
        return found


def _served(plan: Plan) -> Any:
    async def served(port: int) -> dict[str, float]:
        async with Connections(port) as connections:
            bulk = [post("/embed", {"inputs": bulk_items(), "encoding_format": "base64"})]
            await closed(connections, bulk, 2, plan.warm)
            figures = {"bulk_rps": 32 * await closed(connections, bulk, 2, plan.probe)}
            for rows in (1, 32):
                seconds = {}
                for steps in (0, STEPS):
                    request = _complete(rows, steps)
                    await in_turn(connections, [request], plan.warm)
                    seconds[steps] = _middle(await in_turn(connections, [request], plan.probe))
                # The first evaluation comes with the first step.
                figures[f"step_{rows}_ms"] = 1000 * (seconds[STEPS] - seconds[0]) / (STEPS + 1)
            figures["four_steps_ms"] = 1000 * float(
                np.mean([answer.seconds for answer in await in_turn(connections, [_complete(1, 4)], plan.probe)])
            )
            return figures

    return served


def _mixes(plan: Plan) -> dict[str, float]:
    """The 99th percentile of requests without refinement: alone, among one in ten that take 20 steps, and so where batches run
    to completion."""

    def mixing(name: str, share: float) -> Any:
        async def mixed(port: int) -> dict[str, float]:
            async with Connections(port) as connections:
                plain, refined = OURS.requests(pictures()), [_photo(number, 20) for number in range(16)]
                await closed(connections, [*plain, *refined], 8, plan.warm)
                answers = await flow_both(connections, plain, refined, share, plan.paced)
            assert all(answer.status == 200 for answer in answers), name
            told = quantiles(answers)
            return {f"{name}_p50_ms": told["p50"], f"{name}_p99_ms": told["p99"]}

        return mixed

    return {
        **uvloop_run(OURS, mixing("alone", 0.0)),
        **uvloop_run(OURS, mixing("mixed", 0.1)),
        **uvloop_run(COMPLETION, mixing("completion", 0.1)),
    }


async def flow_both(
    connections: Connections, plain: Sequence[bytes], refined: Sequence[bytes], share: float, seconds: float
) -> list[Answer]:
    """Answers to the plain requests, ``share`` of the others among them: the plain ones keep their rate."""
    plain_rate = MIX_RATE * 0.9
    flows = [flow(connections, plain, plain_rate, seconds)]
    if share:
        flows.append(flow(connections, refined, MIX_RATE * share, seconds, seed=1))
    return (await asyncio.gather(*flows))[0]


def _photo(number: int, steps: int) -> bytes:
    return post("/embed", {"inputs": [dict(pictures()[number])], "refine": {"steps": steps}})


def _complete(rows: int, steps: int) -> bytes:
    """Rows that have every modality; a photograph of the right size is a digit's picture too."""
    items = [{**pictures()[n % 16], "digit": pictures()[n % 16]["photo"], "word": "seven"} for n in range(rows)]
    return post("/embed", {"inputs": items, "refine": {"steps": steps}, "encoding_format": "base64"})


def _middle(answers: Sequence[Answer]) -> float:
    return float(np.median([answer.seconds for answer in answers]))
