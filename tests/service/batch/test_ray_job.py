"""The batch job as a command: killed and started again, it continues, and every row is in the output once."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concord.model.bundle import Bundle
from tests.support.images import noise_image
from tests.support.waiting import wait_for

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: make deploy-check installs it", allow_module_level=True)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

T = TypeVar("T")
SECONDS = 300.0
"""Longest wait: Ray takes long to start on a loaded machine."""


@contextlib.contextmanager
def running_job(bundle: Bundle, source: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the command over 3,000 rows in 20 parts."""
    table = pa.table({"number": range(3000), "picture": [noise_image(i, (8, 8), "L") for i in range(3000)]})
    if not source.exists():
        pq.write_table(table, source, row_group_size=150)
    command = [sys.executable, "-m", "concord.service", "embed-dataset", str(source), str(output), "--bundle", str(bundle.path)]
    command += ["--column", "image=picture", "--workers", "2", "--refine-steps", "8"]
    timeouts = {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}
    with subprocess.Popen(
        command, env=os.environ | timeouts, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_while_running(condition: Callable[[], T], process: subprocess.Popen[str]) -> T:
    """Wait for a condition. Fail if the process ends before."""

    def checked() -> T:
        value = condition()
        assert value or process.poll() is None, process.communicate()[0]
        return value

    return wait_for(checked, SECONDS)


def test_killed_command_continues_and_survives_a_killed_worker(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Real processes are killed, which takes a minute or two."""
    source, output = tmp_path / "a.parquet", tmp_path / "output"
    with running_job(tiny_bundle, source, output) as first:
        wait_while_running(lambda: len(list(output.glob("*.parquet"))) >= 2, first)
        first.kill()
    assert 2 <= len(list(output.glob("*.parquet"))) < 20, "the command had finished before it was killed"
    with running_job(tiny_bundle, source, output) as second:
        os.kill(wait_while_running(lambda: busy_workers(second.pid), second)[0], signal.SIGKILL)
        printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    assert "files were there already" in printed
    table = pq.read_table(output)
    assert sorted(table["number"].to_pylist()) == list(range(3000))
    assert table["error"].null_count == 3000


def test_part_that_kills_every_worker_ends_the_job(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_job(tiny_bundle, tmp_path / "a.parquet", tmp_path / "output") as process:

        def ended() -> bool:
            for worker in busy_workers(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            return process.poll() is not None

        wait_for(ended, SECONDS, interval=0.05)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the workers of one part died 4 times" in printed, printed


def busy_workers(driver: int) -> list[int]:
    """Return the processes below the driver that are processing a part."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().decode(errors="replace")
            parents[int(folder.name)] = (int((folder / "stat").read_text().rpartition(")")[2].split()[1]), name)
        except (OSError, ValueError):
            continue
    below = {driver}
    for _ in range(4):
        below |= {pid for pid, (parent, _) in parents.items() if parent in below}
    return [pid for pid in below if pid in parents and "MapWorker" in parents[pid][1] and ".submit" in parents[pid][1]]


def test_command_prints_no_notes_of_ray(tiny_bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": [noise_image(0, (8, 8), "L")]}), source)
    command = [sys.executable, "-m", "concord.service", "embed-dataset", str(source), str(tmp_path / "output")]
    command += ["--bundle", str(tiny_bundle.path), "--column", "image=picture", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    assert done.stdout == "1 rows in 1 files, 0 without embedding; 0 files were there already\n"
    assert [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("embedding ")] == []
