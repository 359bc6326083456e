"""The folder of a run: files are complete, belong to one configuration, and survive interruptions."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from concord.training.checkpoint import Position, Run, write_atomically
from concord.training.config import Config
from concord.training.errors import RunError
from concord.training.machine import peak_memory_bytes

STATE = {"model": {"weight": torch.arange(5.0)}, "optimizer": None}


def log_line(stage: int, step: int, **figures: Any) -> dict[str, Any]:
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


def test_run_keeps_its_configuration_and_rejects_another(run: Run, make_config: Any) -> None:
    stored = json.loads((run.path / "config.json").read_text())
    assert stored.pop("sha256") == make_config().sha256
    assert stored == make_config().model_dump(mode="json")
    Run(run.path, make_config())
    Run(run.path, make_config(device="cpu", version="9"))
    with pytest.raises(RunError, match=r"\(sha256 \w+, this one \w+; seed is 5 and was 0\)"):
        Run(run.path, make_config(seed=5, device="cpu", version="9"))
    with pytest.raises(RunError, match=r"another configuration.*--out.*--fresh"):
        Run(run.path, make_config(seed=1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"joint": {"epochs": 7}}, "joint.epochs is 7 and was 2"),
        ({"data": {"rows_per_epoch": 9}, "seed": 3}, "seed is 3 and was 0, data.rows_per_epoch is 9 and was null"),
        ({"data": {"random_offset": []}}, "data.random_offset differs"),
    ],
)
def test_another_configuration_is_rejected_with_the_keys_that_differ(
    run: Run, make_config: Any, change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RunError, match=rf"another configuration \(sha256 .*; {re.escape(expected)}\)\. Pass the options"):
        Run(run.path, make_config(**change))


def test_run_with_deprecated_keys_in_config_json_continues(tmp_path: Path, make_config: Any) -> None:
    """Folders of version 0.1 hold the old names of two keys."""
    config = make_config(align={"multimodal_weight": 0.4, "jmvae_weight": 0.03})
    stored = {"sha256": config.sha256, **config.model_dump(mode="json")}
    align = stored["align"]
    align["several"], align["pull"] = align.pop("multimodal_weight"), align.pop("jmvae_weight")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    run = Run(tmp_path, config)
    run.save(Position(1, 200), STATE)
    assert Run(tmp_path, config).resume()[0] == Position(1, 200)  # type: ignore[index]
    del stored["sha256"]
    assert Config.model_validate(stored) == config


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_run_with_damaged_config_json_is_rejected(run: Run, make_config: Any, content: str) -> None:
    (run.path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json: damaged"):
        Run(run.path, make_config())


def test_resume_returns_the_last_saved_checkpoint(run: Run) -> None:
    assert run.checkpoint() is None
    assert run.resume() is None
    run.save(Position(1, 200), STATE)
    position, state = run.resume() or pytest.fail("no checkpoint was saved")
    assert position == Position(1, 200)
    assert torch.equal(state["model"]["weight"], torch.arange(5.0))
    assert state["optimizer"] is None
    run.save(Position(2), STATE)
    assert run.checkpoint()[0] == Position(2, 0)  # type: ignore[index]


def test_save_interrupted_keeps_the_previous_checkpoint(run: Run) -> None:
    run.save(Position(0, 200), STATE)

    class Interrupting:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(Position(0, 400), {"model": STATE["model"], "optimizer": Interrupting()})
    assert run.checkpoint()[0] == Position(0, 200)  # type: ignore[index]


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"junk" * 99])
def test_damaged_checkpoint_is_rejected(run: Run, damage: Any) -> None:
    run.save(Position(0, 200), STATE)
    file = run.path / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    for read in (run.checkpoint, run.resume):
        with pytest.raises(RunError, match=r"checkpoint\.pt: cannot be read.*--fresh"):
            read()


def test_checkpoint_with_code_is_rejected_without_running_it(run: Run, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    run.save(Position(0, 200), {"model": Malicious()})
    with pytest.raises(RunError):
        run.checkpoint()
    assert not (tmp_path / "executed").exists()


def test_resume_drops_log_lines_after_the_checkpoint(run: Run) -> None:
    for stage, step in ((0, 50), (0, 100), (1, 50), (1, 100), (1, 150)):
        run.log(log_line(stage, step))
    run.save(Position(1, 100), STATE)
    before = (run.path / "metrics.jsonl").read_bytes()
    run.checkpoint()
    assert (run.path / "metrics.jsonl").read_bytes() == before, "checkpoint() changes no file"
    run.resume()
    assert [(m["stage_index"], m["step"]) for m in run.metrics()] == [(0, 50), (0, 100), (1, 50), (1, 100)]


def test_resume_without_checkpoint_clears_the_log(run: Run) -> None:
    run.log(log_line(0, 50))
    assert run.checkpoint() is None
    assert len(run.metrics()) == 1
    assert run.resume() is None
    assert run.metrics() == []


def test_metrics_skip_an_incomplete_last_line(run: Run) -> None:
    run.log(log_line(0, 50))
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "s0", "st')
    assert len(run.metrics()) == 1


def test_cost_sums_seconds_by_stage(run: Run) -> None:
    assert (run.cost()["seconds"], run.cost()["stages"]) == (0, {})
    for stage, step in ((0, 50), (0, 100), (1, 50)):
        run.log(log_line(stage, step))
    assert (run.cost()["seconds"], run.cost()["stages"]) == (4.5, {"s0": 3.0, "s1": 1.5})


def test_cost_has_the_peak_memory_of_the_log_and_of_this_process(run: Run) -> None:
    """Memory used after the last line of the log, as evaluation does, counts too."""
    run.log({**log_line(0, 50), "peak_memory_bytes": 1})
    assert run.cost()["peak_memory_bytes"] > 0.9 * peak_memory_bytes()
    run.log({**log_line(0, 100), "peak_memory_bytes": 1 << 40})
    assert run.cost()["peak_memory_bytes"] == 1 << 40


def test_read_returns_what_write_wrote_and_rejects_damaged_files(run: Run) -> None:
    with pytest.raises(RunError, match=r"figures\.json: does not exist yet"):
        run.read("figures.json")
    run.write("figures.json", {"probe": 0.5})
    assert run.read("figures.json") == {"probe": 0.5}
    (run.path / "figures.json").write_text("{")
    with pytest.raises(RunError, match=r"figures\.json: damaged"):
        run.read("figures.json")


@pytest.mark.parametrize("content", ["new", b"new"])
def test_write_atomically_replaces_the_file(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    inode = file.stat().st_ino
    write_atomically(file, content)
    assert file.read_text() == "new"
    assert file.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
