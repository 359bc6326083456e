"""One contestant in one round: closed loops, open loops, and what it took from the machine."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from tests.benchmarks.contestants import Contestant, Item
from tests.benchmarks.plan import CONNECTIONS, LIMIT_MS, Plan
from tests.benchmarks.process import Process
from tests.traffic import Answer, Connections, closed, flow, quantiles

Figures = dict[str, float]

PACES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
"""Of the saturation throughput, tried from above for the goodput."""
TOLERANCE = 1e-5


async def measure(
    contestant: Contestant, process: Process, plan: Plan, pictures: Sequence[Item], words: Sequence[Item]
) -> Figures:
    """Everything about a server that just came up."""
    figures = {"cold_start_s": process.cold_start}
    requests = contestant.requests(pictures)
    async with Connections(process.port) as connections:
        await closed(connections, requests, 8, plan.warm)
        generator, began = time.process_time(), time.monotonic()
        figures |= await saturate(connections, requests, plan.closed)
        figures["p50_1_ms"] = quantiles(await in_turn(connections, requests, plan.closed))["p50"]
        for clients in CONNECTIONS[1:]:
            figures[f"word_rps_{clients}"] = await closed(connections, contestant.requests(words), clients, plan.closed)
        figures["cpu_s_per_1000"] = await _cpu(connections, process, requests, plan.closed)
        figures["generator_busy"] = (time.process_time() - generator) / (time.monotonic() - began)
        if contestant.name != "noop":
            for rate in plan.rates:
                figures |= _paced(await flow(connections, requests, rate, plan.paced), rate)
            figures["goodput_rps"] = await goodput(connections, requests, figures[f"rps_{CONNECTIONS[-1]}"], plan.probe)
        figures["resident_mb"] = process.resident_bytes() / 2**20
    return figures


async def measure_alone(contestant: Contestant, process: Process, plan: Plan, pictures: Sequence[Item]) -> Figures:
    """What ``measure`` tells of one connection."""
    requests = contestant.requests(pictures)
    async with Connections(process.port) as connections:
        await in_turn(connections, requests, plan.warm)
        rate = await closed(connections, requests, 1, plan.closed)
        return {"rps_1": rate, "p50_1_ms": quantiles(await in_turn(connections, requests, plan.closed))["p50"]}


async def saturate(connections: Connections, requests: Sequence[bytes], seconds: float) -> Figures:
    """Answers a second at each number of connections."""
    return {f"rps_{clients}": await closed(connections, requests, clients, seconds) for clients in CONNECTIONS}


async def in_turn(connections: Connections, requests: Sequence[bytes], seconds: float) -> list[Answer]:
    """One request after the other."""
    answers: list[Answer] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answers.append(await connections.ask(requests[len(answers) % len(requests)]))
        assert answers[-1].status == 200, answers[-1]
    return answers


async def goodput(connections: Connections, requests: Sequence[bytes], peak: float, seconds: float) -> float:
    """Answers a second at the highest of the paces at which none fails and 99 of 100 come within ``LIMIT_MS`` of when their
    requests were due; 0 where no pace is low enough."""
    for pace in PACES:
        answers = await flow(connections, requests, pace * peak, seconds)
        if all(answer.status == 200 for answer in answers) and quantiles(answers).get("p99", np.inf) <= LIMIT_MS:
            return len(answers) / seconds
    return 0.0


async def assert_alike(contestants: Mapping[str, tuple[Contestant, Process]], items: Sequence[Item]) -> float:
    """The largest difference between anybody's embeddings and the first one's.

    Raises:
        AssertionError: it is above 1e-5: they do not serve the same model.
    """
    found = {}
    for name, (contestant, process) in contestants.items():
        async with Connections(process.port) as connections:
            answers = [await connections.ask(request) for request in contestant.requests(items)]
        assert all(answer.status == 200 for answer in answers), f"{name}: {answers[0]}"
        found[name] = np.concatenate([contestant.read(answer.body) for answer in answers])
    reference = next(iter(found.values()))
    differences = {name: float(np.abs(vectors - reference).max()) for name, vectors in found.items()}
    assert max(differences.values()) <= TOLERANCE, f"the answers differ: {differences}"
    return max(differences.values())


async def _cpu(connections: Connections, process: Process, requests: Sequence[bytes], seconds: float) -> float:
    """Seconds of processor time for 1,000 requests at 16 connections."""
    before, began = process.cpu_seconds(), time.monotonic()
    rate = await closed(connections, requests, 16, seconds)
    return 1000 * (process.cpu_seconds() - before) / (rate * (time.monotonic() - began))


def _paced(answers: Sequence[Answer], rate: int) -> Figures:
    good = [answer for answer in answers if answer.status == 200]
    told = quantiles(good)
    failed = 1 - len(good) / max(1, len(answers))
    return {
        f"p50_at_{rate}_ms": told.get("p50", np.nan),
        f"p99_at_{rate}_ms": told.get("p99", np.nan),
        f"failed_at_{rate}": failed,
    }
