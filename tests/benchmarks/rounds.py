"""The measurements of one server in one round: closed loops, open loops, processor time and memory."""

import time
from collections.abc import Sequence

import numpy as np

from tests.benchmarks import wrk
from tests.benchmarks.plan import CONNECTIONS, LIMIT_MS, Plan
from tests.benchmarks.process import GENERATOR_CORE, Process
from tests.benchmarks.servers import NOOP, Embeddings, Item, Server
from tests.support.traffic import Connections, TimedResponse, closed_loop, open_loop, quantiles

Figures = dict[str, float]

LOAD_FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
"""Fractions of the saturation throughput that the goodput search tries, highest first."""
TOLERANCE = 1e-5
"""Largest absolute difference between two servers' embeddings."""


async def measure(server: Server, process: Process, plan: Plan, photos: Sequence[Item], words: Sequence[Item]) -> Figures:
    """Return all figures of a server that has just started."""
    figures = {"cold_start_s": process.cold_start_seconds}
    requests = server.requests(photos)
    async with Connections(process.port) as connections:
        await closed_loop(connections, requests, 8, plan.warmup)
        generator_cpu, began = time.process_time(), time.monotonic()
        figures["p50_1_ms"] = quantiles(await sequential(connections, requests, plan.closed_loop))["p50"]
        figures |= await saturate(connections, requests, plan.closed_loop)
        for clients in CONNECTIONS[1:]:
            figures[f"word_rps_{clients}"] = await closed_loop(connections, server.requests(words), clients, plan.closed_loop)
        if wrk.is_installed():
            bodies = [server.build_body([item]) for item in photos]
            rate, _ = wrk.closed_loop(process.port, server.path, bodies, CONNECTIONS[-1], plan.closed_loop, [GENERATOR_CORE])
            figures[f"wrk_rps_{CONNECTIONS[-1]}"] = rate
        figures["cpu_s_per_1000"] = await _cpu_seconds_per_1000(connections, process, requests, plan.closed_loop)
        figures["generator_busy"] = (time.process_time() - generator_cpu) / (time.monotonic() - began)
        if server.name != NOOP.name:
            for rate in plan.rates:
                figures |= _open_loop_figures(await open_loop(connections, requests, rate, plan.open_loop), rate)
            saturation = figures[f"rps_{CONNECTIONS[-1]}"]
            figures["goodput_rps"] = await goodput(connections, requests, saturation, plan.probe)
        figures["resident_mb"] = process.resident_bytes() / 2**20
    return figures


async def saturate(connections: Connections, requests: Sequence[bytes], seconds: float) -> Figures:
    """Return responses per second in a closed loop, for each number of connections."""
    return {f"rps_{clients}": await closed_loop(connections, requests, clients, seconds) for clients in CONNECTIONS}


async def sequential(connections: Connections, requests: Sequence[bytes], seconds: float) -> list[TimedResponse]:
    """Send one request at a time and return the responses.

    Raises:
        AssertionError: a response has another status than 200.
    """
    responses: list[TimedResponse] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        responses.append(await connections.send(requests[len(responses) % len(requests)]))
        assert responses[-1].status == 200, responses[-1]
    return responses


async def goodput(connections: Connections, requests: Sequence[bytes], saturation: float, seconds: float) -> float:
    """Return responses per second at the highest load that meets the latency limit, or 0 if no tried load does.

    A load meets the limit if no request fails and the 99th percentile of the latency, counted from when each request is due, is
    at most ``LIMIT_MS``.

    Args:
        saturation: requests per second that the server can process. The search tries the LOAD_FRACTIONS of it.
        seconds: for each load.
    """
    for fraction in LOAD_FRACTIONS:
        responses = await open_loop(connections, requests, fraction * saturation, seconds)
        if all(response.status == 200 for response in responses) and quantiles(responses).get("p99", np.inf) <= LIMIT_MS:
            return len(responses) / seconds
    return 0.0


async def embeddings_of(server: Server, port: int, items: Sequence[Item]) -> Embeddings:
    """Return the embeddings (items, latent) that a server computes.

    Raises:
        AssertionError: a request fails.
    """
    async with Connections(port) as connections:
        responses = [await connections.send(request) for request in server.requests(items)]
    assert all(response.status == 200 for response in responses), f"{server.title}: {responses[0]}"
    return np.concatenate([server.parse_embeddings(response.body) for response in responses])


def verify_same_embeddings(embeddings: Embeddings, reference: Embeddings) -> float:
    """Return the largest absolute difference between the embeddings of two servers.

    Raises:
        AssertionError: it is above TOLERANCE, so the servers do not serve the same model.
    """
    difference = float(np.abs(embeddings - reference).max())
    assert difference <= TOLERANCE, f"embeddings differ by {difference:.1e}, {TOLERANCE} is allowed"
    return difference


async def _cpu_seconds_per_1000(connections: Connections, process: Process, requests: Sequence[bytes], seconds: float) -> float:
    """Return the server's processor time for 1,000 requests at 16 connections, in seconds."""
    before, began = process.cpu_seconds(), time.monotonic()
    rate = await closed_loop(connections, requests, 16, seconds)
    return 1000 * (process.cpu_seconds() - before) / (rate * (time.monotonic() - began))


def _open_loop_figures(responses: Sequence[TimedResponse], rate: int) -> Figures:
    succeeded = [response for response in responses if response.status == 200]
    latencies = quantiles(succeeded)
    return {
        f"p50_at_{rate}_ms": latencies.get("p50", np.nan),
        f"p99_at_{rate}_ms": latencies.get("p99", np.nan),
        f"failed_at_{rate}": 1 - len(succeeded) / max(1, len(responses)),
    }
