"""Each loop runs on the built-in bundle, so that a change of the bundle cannot break the benchmark unnoticed."""

from pathlib import Path

import pytest

from concord.model import bundle
from tests.benchmarks import loops


@pytest.fixture(autouse=True)
def _minimal_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(loops, "MIN_CALLS", 1)


@pytest.mark.parametrize(
    ("name", "figures"), [("encode_rates", 4), ("refine_steps", 2), ("refinement_tick", 2), ("refine_with_torch", 2)]
)
def test_loop_measures_every_figure_on_the_built_in_bundle(name: str, figures: int) -> None:
    measured = loops.FUNCTIONS[name](0.0)
    assert len(measured) == figures
    assert all(value > 0 for value in measured.values())


def test_scaling_point_measures_a_rate_for_each_number_of_steps() -> None:
    measured = loops.scaling_point(0.0, str(Path(bundle.builtin(bundle.DEFAULT_BUNDLE))), "2", "0", "1")
    assert len(measured["rows_per_s"]) == 2
    assert measured["resident_mb"] > 0
