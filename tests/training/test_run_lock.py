"""Two commands never write into the folder of a run at the same time."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from concord.training.checkpoint import Run
from concord.training.cli import app
from concord.training.errors import RunError
from concord.training.run_lock import RunLock
from tests.support.server import ROOT
from tests.support.waiting import wait_for

HOLD = """
import signal, sys, time
from pathlib import Path
from concord.training.run_lock import RunLock
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
with RunLock(Path(sys.argv[1]), "a fit") as lock:
    lock.acquire()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_rejected_with_the_first_ones_pid(holder: Any, tmp_path: Path) -> None:
    expected = rf"{tmp_path / 'run'}: a fit is running in this folder \(pid {holder.pid}\)\. Wait for its end, or .*--out"
    with pytest.raises(RunError, match=expected), RunLock(tmp_path / "run", "an evaluation") as lock:
        lock.acquire()
    with RunLock(tmp_path / "other", "a fit") as lock:
        lock.acquire()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_ended_process_leaves_no_lock(holder: Any, tmp_path: Path, end: signal.Signals) -> None:
    holder.send_signal(end)
    holder.wait()
    with RunLock(tmp_path / "run", "a fit") as lock:
        lock.acquire()
        lock.acquire()
        assert (tmp_path / "run" / "lock").read_text() == f"a fit is running in this folder (pid {os.getpid()})\n"


def test_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "run", "a fit") as first, RunLock(tmp_path / "run", "a fit") as second:
            first.acquire()
            with pytest.raises(RunError, match="is running in this folder"):
                second.acquire()


def test_unused_lock_creates_no_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run", "a fit"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["fit"], ["fit", "--fresh"], ["evaluate"]])
def test_command_in_a_locked_folder_is_rejected_and_changes_nothing(
    holder: Any, write_config: Any, make_config: Any, tmp_path: Path, command: list[str]
) -> None:
    config, run = write_config(tmp_path / "c.toml"), tmp_path / "run"
    Run(run, make_config()).log({"step": 1})
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    result = CliRunner().invoke(app, [command[0], str(config), "--out", str(run), *command[1:]])
    assert result.exit_code == 2
    assert f"error: {run}: a fit is running in this folder (pid {holder.pid})" in result.stderr
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_second_fit_is_rejected_until_the_first_is_killed(write_config: Any, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "c.toml", joint={"epochs": 100_000, "batch_size": 60}), tmp_path / "run"
    options = [str(config), "--out", str(run)]
    command = [sys.executable, "-m", "concord.service", "fit", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for((run / "metrics.jsonl").exists)
            before = [(run / name).read_bytes() for name in ("config.json", "data.json", "lock")]
            second = CliRunner().invoke(app, ["fit", *options])
        finally:
            process.kill()
    assert second.exit_code == 2
    assert f"a fit is running in this folder (pid {process.pid})" in second.stderr
    assert [(run / name).read_bytes() for name in ("config.json", "data.json", "lock")] == before
    with RunLock(run, "a fit") as lock:
        lock.acquire()
