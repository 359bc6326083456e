"""The rows of worker processes, and wrk."""

import os
from dataclasses import replace

import pytest

from tests.benchmarks import workers, wrk
from tests.benchmarks.plan import QUICK

pytestmark = pytest.mark.skipif(not wrk.is_installed(), reason="wrk is not installed")


@pytest.mark.slow
def test_measure_returns_the_figures_of_each_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COUNTS", (2,))
    measured = workers.measure(replace(QUICK, closed_loop=1.0, warmup=0.1), sorted(os.sched_getaffinity(0)))
    for (figures,) in measured.values():
        assert figures["photo_rps"] > 0
        assert figures["word_cpu_s_per_1000"] > 0
        assert figures["resident_mb"] > 200, "of all processes"
