"""The job as people run it: killed from outside, it goes on, and every row is there once."""

import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model.bundle import Bundle

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: make deploy-check does that", allow_module_level=True)

T = TypeVar("T")


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@contextlib.contextmanager
def started(bundle: Bundle, source: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """The command over 3,000 rows in 20 parts."""
    table = pa.table({"number": range(3000), "picture": [picture(i) for i in range(3000)]})
    if not source.exists():
        pq.write_table(table, source, row_group_size=150)
    command = [sys.executable, "-m", "service", "--bundle", str(bundle.path), "embed-dataset", str(source), str(output)]
    command += ["--column", "image=picture", "--workers", "2", "--refine-steps", "8"]
    patient = {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}  # where other work goes on
    with subprocess.Popen(
        command, env=os.environ | patient, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], T], process: subprocess.Popen[str]) -> T:
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_the_command_survives_a_killed_worker_and_its_own_death(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Real processes, by their command line: a minute or two."""
    source, output = tmp_path / "a.parquet", tmp_path / "output"
    with started(tiny_bundle, source, output) as first:
        wait_for(lambda: len(list(output.glob("*.parquet"))) >= 2, first)
        first.kill()
    assert 2 <= len(list(output.glob("*.parquet"))) < 20, "it was to be killed on its way"
    with started(tiny_bundle, source, output) as second:
        os.kill(wait_for(lambda: _busy_workers(second.pid), second)[0], signal.SIGKILL)
        told, _ = second.communicate(timeout=600)
    assert second.returncode == 0, told
    assert "files were there already" in told
    done = pq.read_table(output)
    assert sorted(done["number"].to_pylist()) == list(range(3000))
    assert done["error"].null_count == 3000


def test_a_part_that_no_worker_survives_ends_the_job(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with started(tiny_bundle, tmp_path / "a.parquet", tmp_path / "output") as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            for worker in _busy_workers(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            time.sleep(0.05)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the workers of one part died 4 times" in told, told


def _busy_workers(driver: int) -> list[int]:
    """Processes below the driver that are doing a part."""
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
