"""How long and how often everything is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Durations in seconds.

    Args:
        rounds: in each, every contestant is started and measured once.
        warm: traffic before anything is measured.
        closed: of each number of connections.
        paced: of each rate.
        probe: of each rate that is tried for the goodput.
        rates: requests a second of the open loop.
        tune: of each number of connections for each variant; 0 takes the first variants.
        repeats: of what is measured inside one process.
        scaling: of each point of the scaling figures; 0 leaves them out.
    """

    rounds: int
    warm: float
    closed: float
    paced: float
    probe: float
    rates: tuple[int, ...]
    tune: float
    repeats: int
    scaling: float


CONNECTIONS = (1, 16, 64)
LIMIT_MS = 50
"""What goodput allows the 99th percentile."""
FULL = Plan(rounds=5, warm=1.0, closed=1.5, paced=3.0, probe=1.5, rates=(100, 400, 1000), tune=2.5, repeats=5, scaling=0.5)
QUICK = Plan(rounds=1, warm=0.5, closed=1.0, paced=1.5, probe=1.0, rates=(100, 400, 1000), tune=0, repeats=1, scaling=0)
