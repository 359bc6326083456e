"""A run's folder: whole files, its own configuration, and no surprise for who looks at it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoint import Position, Run, RunError, write_atomically

STATE = {"model": {"weight": torch.arange(5.0)}, "optimizer": None}


def line(stage: int, step: int, **figures: Any) -> dict[str, Any]:
    return {
        "stage": f"s{stage}",
        "stage_index": stage,
        "step": step,
        "seconds": 1.5,
        "peak_memory_bytes": 100 + step,
        **figures,
    }


@pytest.fixture
def run(tmp_path: Path, make_config: Any) -> Run:
    return Run(tmp_path / "deep" / "run", make_config())


def test_a_folder_keeps_its_configuration(run: Run, make_config: Any) -> None:
    stated = json.loads((run.path / "config.json").read_text())
    assert stated.pop("sha256") == make_config().sha256
    assert stated == make_config().model_dump(mode="json")
    Run(run.path, make_config())
    with pytest.raises(RunError, match=r"another configuration.*--out.*--fresh"):
        Run(run.path, make_config(seed=1))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_configuration_is_told(run: Run, make_config: Any, content: str) -> None:
    (run.path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json: damaged"):
        Run(run.path, make_config())


def test_what_is_saved_comes_back(run: Run) -> None:
    assert run.checkpoint() is None
    assert run.resume() is None
    run.save(Position(1, 200), STATE)
    position, state = run.resume() or pytest.fail("nothing was saved")
    assert position == Position(1, 200)
    assert torch.equal(state["model"]["weight"], torch.arange(5.0))
    assert state["optimizer"] is None
    run.save(Position(2), STATE)
    assert run.checkpoint()[0] == Position(2, 0)  # type: ignore[index]


def test_a_crash_while_saving_leaves_the_last_checkpoint(run: Run) -> None:
    run.save(Position(0, 200), STATE)

    class Bad:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(Position(0, 400), {"model": STATE["model"], "optimizer": Bad()})
    assert run.checkpoint()[0] == Position(0, 200)  # type: ignore[index]


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"junk" * 99])
def test_a_damaged_checkpoint_is_told(run: Run, damage: Any) -> None:
    run.save(Position(0, 200), STATE)
    file = run.path / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    for look in (run.checkpoint, run.resume):
        with pytest.raises(RunError, match=r"checkpoint\.pt: cannot be read.*--fresh"):
            look()


def test_a_checkpoint_cannot_run_code(run: Run, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    run.save(Position(0, 200), {"model": Evil()})
    with pytest.raises(RunError):
        run.checkpoint()
    assert not (tmp_path / "owned").exists()


def test_metrics_after_the_checkpoint_are_written_anew(run: Run) -> None:
    for stage, step in ((0, 50), (0, 100), (1, 50), (1, 100), (1, 150)):
        run.log(line(stage, step))
    run.save(Position(1, 100), STATE)
    before = (run.path / "metrics.jsonl").read_bytes()
    run.checkpoint()
    assert (run.path / "metrics.jsonl").read_bytes() == before  # to look changes nothing
    run.resume()
    assert [(m["stage_index"], m["step"]) for m in run.metrics()] == [(0, 50), (0, 100), (1, 50), (1, 100)]


def test_metrics_of_a_run_without_checkpoint_are_forgotten(run: Run) -> None:
    run.log(line(0, 50))
    assert run.checkpoint() is None
    assert len(run.metrics()) == 1
    assert run.resume() is None
    assert run.metrics() == []


def test_a_line_cut_short_is_left_out(run: Run) -> None:
    run.log(line(0, 50))
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "s0", "st')
    assert len(run.metrics()) == 1


def test_cost_adds_up_by_stage(run: Run) -> None:
    assert run.cost() == {"seconds": 0, "stages": {}, "peak_memory_bytes": 0}
    for stage, step in ((0, 50), (0, 100), (1, 50)):
        run.log(line(stage, step))
    assert run.cost() == {"seconds": 4.5, "stages": {"s0": 3.0, "s1": 1.5}, "peak_memory_bytes": 200}


def test_results_are_written_and_read(run: Run) -> None:
    with pytest.raises(RunError, match=r"figures\.json: not there yet"):
        run.read("figures.json")
    run.write("figures.json", {"probe": 0.5})
    assert run.read("figures.json") == {"probe": 0.5}
    (run.path / "figures.json").write_text("{")
    with pytest.raises(RunError, match=r"figures\.json: damaged"):
        run.read("figures.json")


def test_text_replaces_text_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    inode = file.stat().st_ino
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
