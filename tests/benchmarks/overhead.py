"""The overhead of the service relative to its graphs, and the effect of refinement on the latency of other requests."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import uvloop

from tests.benchmarks.items import photo_items
from tests.benchmarks.loops import bulk_items
from tests.benchmarks.plan import Plan
from tests.benchmarks.rounds import Figures, sequential
from tests.benchmarks.servers import CONCORD, Server
from tests.support.server import ROOT
from tests.support.traffic import Connections, TimedResponse, closed_loop, open_loop, post, quantiles

Measurement = Callable[[int], Awaitable[Figures]]
"""Measures the server on a port."""

STEPS = 50
"""Refinement steps of the requests from which the duration of one step is computed."""
MIXED_RATE = 200
"""Requests per second, without and with refinement together."""
RUN_TO_COMPLETION = replace(
    CONCORD, name="completion", command=["-m", "tests.benchmarks.run_to_completion", "serve", "--port", "{port}"]
)


def measure(plan: Plan) -> dict[str, list[float]]:
    """Return the values of each figure, one per repetition."""
    values: dict[str, list[float]] = {}
    for _ in range(plan.repeats):
        figures = {f"raw_{name}_rps": value for name, value in run_loop("encode_rates", plan.probe).items()}
        figures |= {f"graph_step_{rows}_ms": 1000 * value for rows, value in run_loop("refine_steps", plan.probe).items()}
        figures |= {f"torch_{name}_ms": 1000 * value for name, value in run_loop("refine_with_torch", plan.probe).items()}
        figures |= measure_server(CONCORD, _service_figures(plan))
        for name, value in {**figures, **_mixed_load_figures(plan)}.items():
            values.setdefault(name, []).append(value)
    return values


def run_loop(name: str, seconds: float, *arguments: str) -> dict[str, Any]:
    """Return the result of a function of ``loops``, run in a separate process."""
    command = [sys.executable, "-m", "tests.benchmarks.loops", name, str(seconds), *arguments]
    result: dict[str, Any] = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    return result


def measure_server(server: Server, measurement: Measurement) -> Figures:
    """Start the server, and return the figures of one measurement."""
    with server.running({}) as process:

        async def run() -> Figures:
            return await measurement(process.port)

        return uvloop.run(run())


def _service_figures(plan: Plan) -> Measurement:
    """Return a measurement of requests with 32 items, of one refinement step, and of four steps over HTTP."""

    async def measure_service(port: int) -> Figures:
        async with Connections(port) as connections:
            bulk = [post("/embed", {"inputs": bulk_items(), "encoding_format": "base64"})]
            await closed_loop(connections, bulk, 2, plan.warmup)
            figures = {"bulk_rps": 32 * await closed_loop(connections, bulk, 2, plan.probe)}
            for rows in (1, 32):
                seconds = {}
                for steps in (0, STEPS):
                    request = complete_request(rows, steps)
                    await sequential(connections, [request], plan.warmup)
                    seconds[steps] = _median_seconds(await sequential(connections, [request], plan.probe))
                # n steps evaluate the objective n + 1 times.
                figures[f"step_{rows}_ms"] = 1000 * (seconds[STEPS] - seconds[0]) / (STEPS + 1)
            responses = await sequential(connections, [complete_request(1, 4)], plan.probe)
            figures["four_steps_ms"] = 1000 * float(np.mean([response.seconds for response in responses]))
            return figures

    return measure_service


def _mixed_load_figures(plan: Plan) -> Figures:
    """Return latencies in milliseconds of requests without refinement.

    ``alone``: no other requests. ``mixed``: one in ten requests takes 20 refinement steps. ``completion``: the same load, with
    run-to-completion batches.
    """

    def mixed_load(name: str, share: float) -> Measurement:
        async def measure_mixed(port: int) -> Figures:
            async with Connections(port) as connections:
                plain, refined = CONCORD.requests(photo_items()), [photo_request(number, 20) for number in range(16)]
                await closed_loop(connections, [*plain, *refined], 8, plan.warmup)
                responses = await send_mixed(connections, plain, refined, share, plan.open_loop)
            assert all(response.status == 200 for response in responses), name
            latencies = quantiles(responses)
            return {f"{name}_p50_ms": latencies["p50"], f"{name}_p99_ms": latencies["p99"]}

        return measure_mixed

    return {
        **measure_server(CONCORD, mixed_load("alone", 0.0)),
        **measure_server(CONCORD, mixed_load("mixed", 0.1)),
        **measure_server(RUN_TO_COMPLETION, mixed_load("completion", 0.1)),
    }


async def send_mixed(
    connections: Connections, plain: Sequence[bytes], refined: Sequence[bytes], share: float, seconds: float
) -> list[TimedResponse]:
    """Send requests without and with refinement at the same time, and return the responses to those without.

    Args:
        plain: requests without refinement. Their rate does not depend on ``share``.
        refined: requests with refinement.
        share: of MIXED_RATE that goes to ``refined``.
        seconds: length of the load.
    """
    plain_rate = MIXED_RATE * 0.9
    loads = [open_loop(connections, plain, plain_rate, seconds)]
    if share:
        loads.append(open_loop(connections, refined, MIXED_RATE * share, seconds, seed=1))
    return (await asyncio.gather(*loads))[0]


def photo_request(number: int, steps: int) -> bytes:
    return post("/embed", {"inputs": [dict(photo_items()[number])], "refine": {"steps": steps}})


def complete_request(rows: int, steps: int) -> bytes:
    """Return a request whose rows have every modality. The codec converts the photo to the size and colours of ``digit``."""
    photos = [photo_items()[number % 16] for number in range(rows)]
    items = [{**photo, "digit": photo["photo"], "word": "seven"} for photo in photos]
    return post("/embed", {"inputs": items, "refine": {"steps": steps}, "encoding_format": "base64"})


def _median_seconds(responses: Sequence[TimedResponse]) -> float:
    return float(np.median([response.seconds for response in responses]))
