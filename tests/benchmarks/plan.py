"""Durations and repetitions of the measurements."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Durations in seconds.

    Args:
        rounds: number of rounds. Each starts and measures every variant of every server once.
        warmup: load before a measurement.
        closed_loop: for each number of connections.
        open_loop: for each rate in ``rates``.
        probe: for each rate of the goodput search, and for each measurement of ``overhead``.
        rates: requests per second of the open loop.
        repeats: number of repetitions of ``overhead``.
        scaling: for each point of the scaling figure.
    """

    rounds: int
    warmup: float
    closed_loop: float
    open_loop: float
    probe: float
    rates: tuple[int, ...]
    repeats: int
    scaling: float


CONNECTIONS = (1, 16, 64)
LIMIT_MS = 50
"""Largest 99th percentile of the latency that counts as goodput."""
FULL = Plan(rounds=5, warmup=1.0, closed_loop=1.5, open_loop=3.0, probe=1.5, rates=(100, 400, 1000), repeats=5, scaling=0.5)
QUICK = Plan(rounds=1, warmup=0.5, closed_loop=1.0, open_loop=1.5, probe=1.0, rates=(100, 400, 1000), repeats=1, scaling=0.2)
