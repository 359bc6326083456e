"""How a batch is shared, between processes or between passes, changes rounding alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training import data, fit
from training.checkpoint import Position, Run, RunError
from training.config import Config, ConfigError
from training.parallel import Noise, Team
from training.progress import Progress

ROOT = Path(fit.__file__).parent.parent
STAGES = ("joint", "refiner", "align")
STEPS = 15  # a stage, of 3 an epoch
PLAN: dict[str, Any] = {
    "joint": {"epochs": 5, "batch_size": 20},
    "refiner": {"epochs": 5, "batch_size": 20, "steps": 1},
    "align": {"epochs": 5, "batch_size": 20},
}
# Biases that the normalisation behind them takes away: their slope is rounding alone, and Adam makes steps of it.
WITHOUT_SLOPE = re.compile(r"trunks\.digit\.(1|4|7)\.bias")
# The real command but for the constants: checkpoints are frequent, so that tiny runs have some.
COMMAND = """
import sys
from pathlib import Path
from training import fit
fit.LOG_STEPS, fit.CHECKPOINT_STEPS = 2, 6
from training.__main__ import app
try:
    app()
finally:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("threads of the group:", [name for name in names if "gloo" in name], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def settings(make_config: Any) -> Config:
    found: Config = make_config(**PLAN)
    return found


@pytest.fixture(scope="module")
def alone(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a single process makes of whole batches."""
    return trained(settings, tmp_path_factory.mktemp("alone"))


@pytest.fixture(autouse=True)
def _frequent() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 2)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        yield


def trained(settings: Config, folder: Path) -> Run:
    run = Run(folder, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 2)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        fit.fit(settings, data.load(settings, "train"), run, Progress(quiet=True))
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(3, 0)
    found: dict[str, torch.Tensor] = state["model"]
    return found


def figures(run: Run) -> list[dict[str, Any]]:
    times = {"seconds", "examples_per_second", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in times} for line in run.metrics()]


def assert_close(run: Run, expected: Run) -> None:
    found = weights(run)
    for name, weight in weights(expected).items():
        if not WITHOUT_SLOPE.search(name):
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}")
    assert [line.keys() for line in figures(run)] == [line.keys() for line in figures(expected)]
    for line, told in zip(figures(run), figures(expected), strict=True):
        assert line.pop("stage") == told.pop("stage")
        assert line == pytest.approx(told, rel=1e-5, abs=2e-4)


def begun(processes: int, config: Path, run: Path) -> subprocess.Popen[str]:
    """The command as a user types it, in a process group of its own."""
    script = config.with_suffix(".py")
    script.write_text(COMMAND)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(script), "fit", str(config), "--out", str(run)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(run.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err


def kill_at(process: subprocess.Popen[str], run: Path, stage: int, step: int) -> None:
    """SIGKILL for torchrun and all that it started, once that place is logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        file = run / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        if lines and (json.loads(lines[-1])["stage_index"], json.loads(lines[-1])["step"]) >= (stage, step):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(workers) == 2  # each leads a process group of its own
            for each in [process.pid, *map(int, workers)]:
                os.killpg(each, signal.SIGKILL)
            process.communicate(timeout=60)
            return
        time.sleep(0.002)
    pytest.fail(f"never logged stage {stage}, step {step}")


@pytest.fixture(scope="module")
def together(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, str]:
    """What two processes make of the same batches, and what they print."""
    folder = tmp_path_factory.mktemp("together")
    out, err = ended(begun(2, write_config(folder / "tiny.toml", **PLAN), folder / "run"))
    return opened(folder / "run"), out, err


def opened(path: Path) -> Run:
    stated = json.loads((path / "config.json").read_text())
    return Run(path, Config.model_validate({key: value for key, value in stated.items() if key != "sha256"}))


def test_two_processes_train_as_one(together: tuple[Run, str, str], alone: Run) -> None:
    assert_close(together[0], alone)


def test_one_of_two_processes_speaks_and_writes(together: tuple[Run, str, str]) -> None:
    run, out, err = together
    assert out.count("export it with") == 1
    assert err.count(f"joint: step {STEPS} of {STEPS}") == 1
    assert "Traceback" not in err
    places = [(line["stage"], line["step"]) for line in run.metrics()]
    assert places == [(name, step) for name in STAGES for step in (2, 4, 6, 8, 10, 12, 14, STEPS)]
    assert (run.path / "evaluation.json").exists()


def test_the_group_ends_with_its_threads(together: tuple[Run, str, str]) -> None:
    """Those that outlive it abort the interpreter's end now and then."""
    assert together[2].count("threads of the group: []") == 2


@pytest.fixture(scope="module")
def killed(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes that SIGKILL met in the second of three stages. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at(begun(2, write_config(folder / "tiny.toml", **PLAN), folder / "run"), folder / "run", 1, 8)
    return folder


def test_two_processes_killed_end_with_the_same_numbers(killed: Path, together: tuple[Run, str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    _, err = ended(begun(2, folder / "tiny.toml", folder / "run"))
    assert err.count("continuing at stage 2 of 3, step ") == 1
    run = opened(folder / "run")
    assert all(torch.equal(weight, weights(together[0])[name]) for name, weight in weights(run).items())
    assert figures(run) == figures(together[0])


def test_one_process_continues_what_two_began(killed: Path, alone: Run, settings: Config, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed / "run", tmp_path / "run"))
    assert_close(trained(settings, run), alone)


def test_passes_train_as_whole_batches(settings: Config, alone: Run, tmp_path: Path) -> None:
    shared = settings.model_copy(update={name: getattr(settings, name).model_copy(update={"accumulate": 4}) for name in STAGES})
    assert_close(trained(shared, tmp_path), alone)


def test_the_only_batch_of_an_epoch_may_be_uneven(make_config: Any, tmp_path: Path) -> None:
    """Sixty rows where the batch would take 77: seven passes of unequal sizes still weigh each row alike."""
    stage = {"epochs": 3, "batch_size": 77}
    whole, shared = (make_config(**{name: {**stage, "accumulate": passes} for name in STAGES}) for passes in (1, 7))
    assert_close(trained(shared, tmp_path / "shared"), trained(whole, tmp_path / "whole"))


def test_noise_of_shares_is_that_of_the_whole() -> None:
    def drawn(share: slice | None) -> list[torch.Tensor]:
        noise = Noise(3, 10, share)
        order = noise.order(5)
        return [noise.normal(2, 3), noise.choices(4), noise.normal(1), order]

    *rows, order = drawn(None)
    for first, second, whole in zip(drawn(slice(0, 4))[:3], drawn(slice(4, 10))[:3], rows, strict=True):
        assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(drawn(slice(4, 10))[3], order)


@pytest.mark.parametrize(("rows", "size", "accumulate"), [(12, 1, 1), (12, 2, 3), (7, 2, 2), (4, 4, 1)])
def test_shares_part_a_batch(rows: int, size: int, accumulate: int) -> None:
    shares = [share for rank in range(size) for share in Team(rank, size).shares(rows, accumulate)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    assert len(shares) == size * accumulate


def test_uneven_shares_are_refused_with_the_remedy(make_config: Any, tmp_path: Path) -> None:
    settings = make_config(refiner={"accumulate": 3})
    with pytest.raises(ConfigError, match=r"refiner\.batch_size is 20, .*2 processes.*accumulate = 3.*multiple of 6"):
        Team(0, 2).check(settings)
    with pytest.raises(ConfigError, match="multiple of 3"):
        trained(settings, tmp_path)
    with pytest.raises(ConfigError, match=r"batch of 3 rows is too small for 2 processes with accumulate = 2"):
        Team(0, 2).shares(3, 2)


def test_processes_do_not_outlive_torchrun() -> None:
    with pytest.raises(RunError, match="torchrun is gone: the same command continues"):
        Team(0, 2, parent=0).add_up([], torch.zeros(1))


def test_rivals_say_that_they_take_whole_batches(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='only model = "concord" shares its batches'):
        trained(make_config(model="mopoe", joint={"accumulate": 2}), tmp_path)
