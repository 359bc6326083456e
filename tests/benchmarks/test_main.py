"""The whole run: every variant in every round, and what a part that fails loses."""

import os
from dataclasses import replace

import pytest

from tests.benchmarks.__main__ import Parts, choose_variant, run_rounds, same_servers
from tests.benchmarks.plan import QUICK
from tests.benchmarks.servers import CONCORD, PLAIN, Server

SHORT = replace(QUICK, rounds=2, warmup=0.05, closed_loop=0.05, open_loop=0.1, probe=0.05, rates=(100,))
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the server and the load generator need a core each")


def broken(server: Server, variant: dict[str, str]) -> Server:
    """Return a server that has one more variant and does not start with it."""
    return replace(server, variants=[*server.variants[:1], variant], command=["-c", BREAKS, *server.command])


BREAKS = """
import os, runpy, sys
if "BREAK" in os.environ:
    sys.exit("broken on purpose")
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_run_rounds_measures_every_variant_in_every_round_and_survives_one_that_does_not_start() -> None:
    parts = Parts()
    server = broken(PLAIN, {"HANDLER": "thread", "BREAK": "1"})
    variants = run_rounds([server, CONCORD], SHORT, parts)
    assert [len(entry["rounds"]) for entry in variants[PLAIN.name]] == [2, 0]
    assert len(variants[CONCORD.name][0]["rounds"]) == 2
    assert variants[CONCORD.name][0]["rounds"][0]["rps_64"] > 0
    assert choose_variant(variants[PLAIN.name]) == PLAIN.variants[0]
    assert len(parts.failures) == 2
    assert "round 1: FastAPI, no batching HANDLER=thread BREAK=1: NotStartedError" in parts.failures[0]
    assert "broken on purpose" in parts.failures[0]


@pytest.mark.slow
def test_same_servers_leaves_out_a_server_that_does_not_start() -> None:
    parts = Parts()
    server = replace(PLAIN, variants=[{"BREAK": "1"}], command=["-c", BREAKS, *PLAIN.command])
    same, difference = same_servers([CONCORD, server, PLAIN], parts)
    assert [one.variants for one in same] == [CONCORD.variants, PLAIN.variants]
    assert 0 <= difference < 1e-5
    assert len(parts.failures) == 1
    with pytest.raises(RuntimeError, match="Concord does not start"):
        same_servers([replace(CONCORD, command=["-c", "raise SystemExit(1)"])], Parts())


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [({"a": [(10, 10)], "b": [(8, 20)]}, "b"), ({"a": [(10, 10), (10, 10)], "b": [(80, 20)]}, "a"), ({"a": [], "b": []}, "a")],
    ids=["highest geometric mean", "not one that failed in a round", "all failed"],
)
def test_choose_variant_takes_the_fastest_that_did_not_fail(rates: dict[str, list[tuple[float, float]]], chosen: str) -> None:
    entries = [
        {"variant": {"NAME": name}, "rounds": [{"rps_16": low, "rps_64": high} for low, high in pairs]}
        for name, pairs in rates.items()
    ]
    assert choose_variant(entries) == {"NAME": chosen}
