"""Profiles: which part a sample counts for, and a short profile of the service."""

import os

import pytest

from tests.benchmarks.items import photo_items
from tests.benchmarks.profile import part_of, profile, shares
from tests.benchmarks.servers import CONCORD
from tests.support.traffic import Connections, closed_loop

MAIN = "Runner.run (asyncio/runners.py:118)"
EMBED = "embed (service/api/routes.py:41)"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        ([MAIN], "event loop and sockets"),
        ([MAIN, EMBED], "routes"),
        ([MAIN, EMBED, "parse (model/codec/__init__.py:123)", "open (PIL/Image.py:3704)"], "pictures, base64, texts"),
        ([MAIN, EMBED, "work (service/api/requests.py:9)", "loads (json/decoder.py:1)"], "JSON, options, items"),
        (["_run (service/inference/engine.py:1)", "Session.run (onnxruntime/capi/x.py:4)"], "ONNX Runtime"),
        (["_run (service/inference/engine.py:1)", "Condition.wait (threading.py:331)"], "change of threads"),
        (["<module> (somewhere.py:1)"], "other"),
    ],
)
def test_part_of_is_that_of_the_innermost_function_that_one_names(stack: list[str], part: str) -> None:
    assert part_of(stack) == part


def test_shares_count_samples() -> None:
    lines = [f"{MAIN};{EMBED} 3", f"{MAIN} 1"]
    assert shares(lines) == {"routes": 0.75, "event loop and sockets": 0.25}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the server and the load generator need a core each")
def test_profile_of_a_service_finds_its_parts() -> None:
    requests = CONCORD.requests(photo_items())

    async def load(connections: Connections, seconds: float) -> None:
        await closed_loop(connections, requests, 16, seconds)

    with CONCORD.running({}) as process:
        found = profile(process, load, seconds=2)
    assert {"ONNX Runtime", "pictures, base64, texts", "HTTP protocol"} <= found.keys()
    assert sum(found.values()) == pytest.approx(1, abs=0.02)
    assert found.get("other", 0) < 0.1
