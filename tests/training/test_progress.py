"""Progress of long operations, as lines of standard error."""

import time

import pytest

from concord.training.progress import Progress


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().err.splitlines()]


def test_first_line_is_printed_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress().stage("joint", 100, 40) as advance:
        assert lines(capsys) == ["joint: step 40 of 100"]
        advance(41, {"elbo": -12.34567, "training left": "3 min"})
        assert lines(capsys) == ["joint: step 41 of 100  elbo -12.35  training left 3 min"]


def test_lines_between_first_and_last_are_limited_by_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress().stage("joint", 30) as advance:
        for step in range(1, 31):
            now += 3.0
            advance(step, {})
    assert lines(capsys) == [
        "joint: step 0 of 30",
        *(f"joint: step {step} of 30  left {90 - 3 * step} s" for step in (1, 5, 9, 13, 17, 21, 25, 29)),
        "joint: step 30 of 30",
    ]


def test_time_left_of_a_continued_stage_counts_its_own_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress().stage("refine", 30, 20) as advance:
        now = 8.0
        advance(24, {})
    assert lines(capsys) == ["refine: step 20 of 30", "refine: step 24 of 30  left 12 s"]
