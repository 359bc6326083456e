"""The tables say what was measured: medians, ratios to ours, and what was missed by how much."""

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.contestants import ALL, NOOP, OURS, PLAIN
from tests.benchmarks.report import Target, section, targets, write

FIGURES = {
    "rps_1": 100.0,
    "rps_16": 100.0,
    "rps_64": 100.0,
    "word_rps_16": 100.0,
    "word_rps_64": 100.0,
    "p50_1_ms": 2.0,
    "p50_at_100_ms": 1.0,
    "p99_at_100_ms": 4.0,
    "failed_at_100": 0.0,
    "goodput_rps": 90.0,
    "cpu_s_per_1000": 1.0,
    "resident_mb": 200.0,
    "cold_start_s": 1.5,
}
INSIDE = {
    "bulk_rps": 90.0,
    "raw_bulk_rps": 100.0,
    "step_1_ms": 1.1,
    "graph_step_1_ms": 1.0,
    "step_32_ms": 40.0,
    "graph_step_32_ms": 32.0,
    "alone_p99_ms": 2.0,
    "mixed_p99_ms": 5.0,
    "completion_p99_ms": 60.0,
    "four_steps_ms": 6.0,
    "torch_eager_ms": 20.0,
    "torch_graphs_ms": 5.0,
}


@pytest.fixture
def content() -> dict[str, Any]:
    rounds = {one.name: [dict(FIGURES) for _ in range(3)] for one in ALL}
    for speed, found in zip((240.0, 260.0, 1000.0), rounds[OURS.name], strict=True):
        found["rps_16"] = speed
    rounds["litserve"][1]["failed_at_100"] = 0.25
    for found in rounds[NOOP.name]:
        del found["goodput_rps"]
    return {
        "command": "make bench",
        "minutes": 30.0,
        "machine": {"processor": "a processor", "threads": 1, "libraries": {"onnxruntime": "1"}, "peers": ["litserve==1"]},
        "rounds": rounds,
        "chosen": {one.name: {"BATCH": "32"} for one in ALL},
        "inside": {name: [value] for name, value in INSIDE.items()},
    }


def test_cells_are_medians_and_ratios(content: dict[str, Any]) -> None:
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in section(content).splitlines()}
    assert lines["requests/s, 16 connections"][:2] == ["260 ± 190", "100 ± 0 (0.38)"]
    assert lines["p50 at 100 requests/s, ms"][1] == "1.0 ± 0.0 (1.00), 25% failed"
    assert lines["requests/s, 1 connection"][1] == "100 ± 0 (1.00)"
    assert lines["goodput: requests/s with p99 ≤ 50 ms"][-1].strip(" |") == ""
    assert PLAIN.title in section(content)


def test_targets_say_what_was_reached(content: dict[str, Any]) -> None:
    found = {target.what.partition(",")[0]: target for target in targets(content)}
    assert found["throughput at 16 connections"].reached == pytest.approx(2.6)
    assert found["throughput at 16 connections"].met
    assert found["a refinement step of 32 rows"].row().endswith("| ≤ 1.15 | 1.25 | missed by 9% |")
    assert found["p99 of requests without refinement where one in ten takes 20 steps"].reached == pytest.approx(2.5)


@pytest.mark.parametrize(("reached", "at_least", "met"), [(2.0, True, True), (1.9, True, False), (2.1, False, False)])
def test_a_bound_is_met_on_its_side(reached: float, at_least: bool, met: bool) -> None:
    assert Target("x", reached, 2.0, at_least).met == met


def test_it_goes_between_the_markers(content: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Text\n<!-- performance -->\nformer\n<!-- /performance -->\nmore\n")
    write(readme, content)
    write(readme, content)
    text = readme.read_text()
    assert text.startswith("# Text\n<!-- performance -->\na processor")
    assert text.endswith("<!-- /performance -->\nmore\n")
    assert "former" not in text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers"):
        write(readme, content)
