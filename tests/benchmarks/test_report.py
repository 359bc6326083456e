"""The tables: medians, ratios to Concord, targets, and agreement of the documents with the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.__main__ import describe_bundle
from tests.benchmarks.report import (
    BENCHMARK_MARKER,
    BENCHMARK_README,
    LATEST,
    PROFILE,
    PROFILE_MARKER,
    README,
    README_MARKER,
    Target,
    benchmark_section,
    performance_section,
    profile_section,
    targets,
    write,
)
from tests.benchmarks.scaling import FIGURE
from tests.benchmarks.servers import CONCORD, NOOP, PLAIN, SERVERS
from tests.support.documents import section

FIGURES = {
    "rps_1": 100.0,
    "rps_16": 100.0,
    "rps_64": 100.0,
    "word_rps_16": 100.0,
    "word_rps_64": 100.0,
    "p50_1_ms": 10.0,
    "p50_at_400_ms": 1.0,
    "p99_at_400_ms": 4.0,
    "failed_at_400": 0.0,
    "p50_at_1000_ms": 1.0,
    "p99_at_1000_ms": 4.0,
    "failed_at_1000": 0.0,
    "goodput_rps": 90.0,
    "cpu_s_per_1000": 1.0,
    "resident_mb": 200.0,
    "cold_start_s": 1.5,
}
INSIDE = {
    "bulk_rps": 90.0,
    "raw_bulk_rps": 100.0,
    "raw_bulk_word_rps": 25.0,
    "raw_picture_rps": 300.0,
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
MISSED = 6
"""Targets that these figures miss."""


@pytest.fixture
def content() -> dict[str, Any]:
    rounds = {server.name: [dict(FIGURES) for _ in range(3)] for server in SERVERS}
    for rate, figures in zip((240.0, 260.0, 1000.0), rounds[CONCORD.name], strict=True):
        figures["rps_16"] = rate
    rounds["litserve"][1]["failed_at_400"] = 0.25
    for figures in rounds[NOOP.name]:
        del figures["goodput_rps"]
    return {
        "command": "make bench",
        "minutes": 30.0,
        "bundle": {"name": "digits", "sha256": "0123456789abcdef"},
        "machine": {
            "processor": "a processor",
            "cores": 2,
            "system": "Linux",
            "python": "3.11",
            "threads": 1,
            "libraries": {"onnxruntime": "1"},
            "competitors": ["litserve==1"],
        },
        "largest_difference": 4e-8,
        "rounds": rounds,
        "chosen": {server.name: {"BATCH": "32"} for server in SERVERS},
        "inside": {name: [value] for name, value in INSIDE.items()},
    }


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of all table rows by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_benchmark_section_cells_show_medians_spreads_and_ratios(content: dict[str, Any]) -> None:
    text = benchmark_section(content)
    cells = rows(text)
    assert cells["requests/s, 16 connections"][:2] == ["260 ± 190", "100 ± 0 (0.38)"]
    assert cells["p50 latency at 400 requests/s, ms"][1] == "1.0 ± 0.0 (1.00), 25% failed"
    assert cells["requests/s, 1 connection"][1] == "100 ± 0 (1.00)"
    assert cells["goodput: requests/s with p99 ≤ 50 ms"][-2] == "", "no figure of the no-op route"
    assert cells["requests/s, 1 connection"][-1] == "75 (Concord: 1.33)", "no-op 100, parsing and encoding 300"
    assert cells["requests/s, 16 connections"][-1] == "50 (Concord: 5.20)", "in batches 100"
    assert cells["requests/s, 64 connections, a word"][-1] == "20 (Concord: 5.00)"
    assert cells["goodput: requests/s with p99 ≤ 50 ms"][-1] == "50 (Concord: 1.80)", "that of 64 connections"
    assert PLAIN.title in text


def test_benchmark_section_names_machine_bundle_versions_settings_and_command(content: dict[str, Any]) -> None:
    content["failures"] = ["round 1: BentoML BATCH=1 WORKERS=2: NotStartedError: not ready"]
    text = benchmark_section({**content, "scaling": {}})
    for part in (
        "`make bench` measured these figures in 30.0 minutes",
        "a processor (CPU only), 2 cores, Linux, Python 3.11",
        "bundle `digits`, SHA-256 `0123456789ab…`",
        "onnxruntime 1; competitors: `litserve==1`",
        "3 interleaved rounds",
        "- Settings: LitServe `BATCH=32`; ",
        "- Failed: round 1: BentoML BATCH=1 WORKERS=2: NotStartedError: not ready.",
        "(results/scaling.png)",
    ):
        assert part in text


def test_workers_table_shows_ratios_to_one_worker(content: dict[str, Any]) -> None:
    one = {
        "photo_rps": 100.0,
        "word_rps": 200.0,
        "photo_cpu_s_per_1000": 1.0,
        "word_cpu_s_per_1000": 0.5,
        "resident_mb": 200.0,
        "cores": 1,
    }
    two = {name: 2 * value for name, value in one.items()} | {"photo_rps": 190.0}
    assert "Worker processes" not in benchmark_section(content)
    content["workers"] = {"1": [one], "2": [two], "4": [two]}
    cells = rows(benchmark_section(content))
    assert cells["1"][:2] == ["100", "200 (limit: 10.00)"]
    assert cells["2"][:2] == ["190 (1.90)", "400 (2.00, limit: 10.00)"]
    assert "4 on 2 cores" in cells
    assert {target.name: target for target in targets(content)}["throughput of 2 workers on 2 cores vs 1 on 1"].met


def test_request_table_splits_the_time_of_a_request(content: dict[str, Any]) -> None:
    cells = rows(benchmark_section(content))
    assert cells["16 connections"] == ["3846", "10000", "10000", "-16154"]
    assert cells["64 connections, a word"] == ["10000", "10000", "40000", "-40000"]


def test_profile_section_shows_shares_operators_and_memory() -> None:
    profile = {
        "load_average": 0.5,
        "loads": {"photo": {"ONNX Runtime": 0.5, "response": 0.25}, "word": {"response": 1.0}},
        "operators": {"encoder": {"Conv": 0.6, "Gemm": 0.2}},
        "memory_mb": {"Python": 90.0, "bundle": 60.0},
    }
    text = profile_section(profile)
    cells = rows(text)
    assert cells["share of samples"] == ["photo", "word"]
    assert cells["ONNX Runtime"] == ["50%", ""]
    assert cells["response"] == ["25%", "100%"]
    assert cells["encoder"] == ["Conv 60%, Gemm 20%"]
    assert "150 MB: Python 90, bundle 60." in text
    assert "load average" not in text
    assert "load average was 9" in profile_section({**profile, "load_average": 9.0})


def test_variants_table_has_all_variants_and_marks_the_chosen_one(content: dict[str, Any]) -> None:
    figures = [dict(FIGURES), {**FIGURES, "rps_16": 300.0}]
    content["variants"] = {
        "litserve": [
            {"variant": {"BATCH": "32"}, "rounds": figures},
            {"variant": {"BATCH": "1"}, "rounds": []},
        ],
        CONCORD.name: [{"variant": {}, "rounds": figures}],
    }
    cells = rows(benchmark_section(content))
    assert cells["**LitServe `BATCH=32`**"][:3] == ["100", "200", "100"]
    assert set(cells["LitServe `BATCH=1`"]) == {"failed"}
    assert not any(name.startswith(("**Concord", "Concord `")) for name in cells)


def test_sections_without_a_failed_server_keep_the_rows_of_the_others(content: dict[str, Any]) -> None:
    before = {target.name for target in targets(content)}
    for name in ("mlserver", PLAIN.name):
        del content["rounds"][name], content["chosen"][name]
    content["rounds"]["bentoml"] = []
    content["inside"] = {}
    cells = rows(benchmark_section(content))
    assert cells["requests/s, 16 connections"][:5] == ["260 ± 190", "100 ± 0 (0.38)", "", "", ""]
    left = {target.name for target in targets(content)}
    assert "throughput at 16 connections vs best competitor" in left, "LitServe is left"
    assert {name.partition(" vs ")[2] for name in before - left} >= {"FastAPI without batching", "PyTorch eager autograd"}
    assert "16 connections" in performance_section(content)


def test_benchmark_section_without_recorded_bundle_says_so(content: dict[str, Any]) -> None:
    del content["bundle"]
    assert "version of the built-in bundle is not recorded" in benchmark_section(content)
    assert "version of the built-in bundle is not recorded" in performance_section(content)


def test_performance_section_has_one_row_for_each_figure_of_the_short_table(content: dict[str, Any]) -> None:
    cells = rows(performance_section(content))
    assert list(cells)[1:] == [
        "requests/s, 16 connections",
        "requests/s, 64 connections",
        "p50 latency at 1 connection, ms",
        "p99 latency at 400 requests/s, ms",
        "resident memory, MB",
    ]
    assert cells["requests/s, 16 connections"][:2] == ["260", "100 (0.38)"]
    assert cells["p99 latency at 400 requests/s, ms"][1] == "4.0 (1.00), 25% failed"
    assert all(len(row) == len(SERVERS) for row in cells.values())


def test_performance_section_counts_the_missed_targets_after_the_link(content: dict[str, Any]) -> None:
    assert len([target for target in targets(content) if not target.met]) == MISSED
    assert f"(tests/benchmarks/README.md): {MISSED} of 17 targets were missed." in performance_section(content)


def test_targets_show_measured_values(content: dict[str, Any]) -> None:
    by_name = {target.name: target for target in targets(content)}
    assert len(by_name) == len(targets(content))
    throughput = by_name["throughput at 16 connections vs best competitor"]
    assert throughput.measured == pytest.approx(2.6)
    assert throughput.met
    step = by_name["refinement step of 32 rows vs the graph alone"]
    assert step.row().endswith("| ≤ 1.15 | 1.25 | missed by 9% |")
    mixed = by_name["p99 of plain requests with 10% refined requests vs none"]
    assert mixed.measured == pytest.approx(2.5)
    assert "(refined requests take 20 steps; with run-to-completion batches: 30.00)" in mixed.row()


@pytest.mark.parametrize(("measured", "at_least", "met"), [(2.0, True, True), (1.9, True, False), (2.1, False, False)])
def test_target_is_met_on_the_right_side_of_its_bound(measured: float, at_least: bool, met: bool) -> None:
    assert Target("x", measured, 2.0, at_least).met == met


def test_write_replaces_the_text_between_the_markers(content: dict[str, Any], tmp_path: Path) -> None:
    documents = (tmp_path / "README.md", tmp_path / "BENCHMARKS.md")
    markers = (README_MARKER, BENCHMARK_MARKER)
    for document, marker in zip(documents, markers, strict=True):
        document.write_text(f"# Text\n<!-- {marker} -->\nformer\n<!-- /{marker} -->\nmore\n")
    write(content, *documents, tmp_path)
    write(content, *documents, tmp_path)
    assert not (tmp_path / FIGURE).exists(), "not measured"
    for document, marker, text in zip(
        documents, markers, (performance_section(content), benchmark_section(content)), strict=True
    ):
        assert document.read_text() == f"# Text\n<!-- {marker} -->\n{text}\n<!-- /{marker} -->\nmore\n"


def test_write_to_a_document_without_markers_raises(content: dict[str, Any], tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("nothing")
    with pytest.raises(AssertionError, match="markers of performance are missing"):
        write(content, document, document)
    assert document.read_text() == "nothing"


def test_published_sections_equal_the_committed_results() -> None:
    latest = json.loads(LATEST.read_text())
    remedy = "run: .venv/bin/python -m tests.benchmarks.report"
    assert section(README.read_text(encoding="utf-8"), README_MARKER) == performance_section(latest), remedy
    document = BENCHMARK_README.read_text(encoding="utf-8")
    assert section(document, BENCHMARK_MARKER) == benchmark_section(latest), remedy
    assert section(document, PROFILE_MARKER) == profile_section(json.loads(PROFILE.read_text())), remedy


def test_published_performance_table_has_at_most_five_rows() -> None:
    cells = rows(section(README.read_text(encoding="utf-8"), README_MARKER))
    assert 0 < len(cells) - 1 <= 5


def test_published_results_are_of_the_built_in_bundle() -> None:
    """After the bundle has changed, the benchmark must run again."""
    assert json.loads(LATEST.read_text()).get("bundle") == describe_bundle()
