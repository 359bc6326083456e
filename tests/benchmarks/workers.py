"""Throughput of ``concord serve --workers N`` on N cores, or on all of fewer cores, by wrk.

If there is no further core, wrk shares those of the workers. Its processor time is then subtracted: the throughput is divided
by the share of the cores' time that wrk left.
"""

from dataclasses import replace

from tests.benchmarks import wrk
from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.plan import CONNECTIONS, Plan
from tests.benchmarks.servers import CONCORD

COUNTS = (1, 2, 4)


def measure(plan: Plan, cores: list[int]) -> dict[str, list[dict[str, float]]]:
    """Return the figures of each number of workers in each round. Empty if wrk is not installed."""
    counts = COUNTS if wrk.is_installed() else ()
    rounds: dict[str, list[dict[str, float]]] = {str(count): [] for count in counts}
    for _ in range(plan.rounds):
        for count in counts:
            rounds[str(count)].append(_measure(count, cores, plan))
    return rounds


def _measure(count: int, cores: list[int], plan: Plan) -> dict[str, float]:
    own, others = cores[:count], cores[count:]
    server = replace(CONCORD, command=[*CONCORD.command, "--workers", str(count)], ready_path="/readyz")
    figures: dict[str, float] = {"workers": count, "cores": len(own)}
    settings = {"CONCORD_THREADS": str(count), "CONCORD_READY_SHARE": "1"}
    with server.running(settings, own) as process:
        for name, items in (("photo", photo_items()), ("word", word_items())):
            bodies = [server.build_body([item]) for item in items]
            wrk.closed_loop(process.port, server.path, bodies, CONNECTIONS[-1], plan.warmup, others or own)
            before = process.cpu_seconds()
            rate, generator = wrk.closed_loop(
                process.port, server.path, bodies, CONNECTIONS[-1], plan.closed_loop, others or own
            )
            whole = max(1, round(plan.closed_loop + 0.499))
            figures[f"{name}_cpu_s_per_1000"] = 1000 * (process.cpu_seconds() - before) / (rate * whole)
            figures[f"{name}_rps"] = rate if others else rate / (1 - generator / len(own))
        figures["resident_mb"] = process.resident_bytes() / 2**20
    return figures
