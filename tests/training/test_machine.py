"""Peak memory, and errors of a full disk. The faults are real: a device and a small file system that are full, a limit."""

import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concord.training import fit
from concord.training.checkpoint import Position, Run, write_atomically
from concord.training.errors import RunError
from concord.training.machine import full_disk_reported
from tests.support.server import ROOT

STATE = {"model": {"weight": torch.zeros(1 << 20)}, "optimizer": None}
TMPFS = ["unshare", "--user", "--map-root-user", "--mount"]
"""Command that runs another one where it may mount a file system, which no other process sees."""


def test_peak_memory_is_the_largest_of_the_process_and_not_of_its_parent() -> None:
    """Linux keeps the peak that getrusage returns over exec: here it would be at least 500 MiB."""
    code = """if True:
        import numpy
        from concord.training.machine import peak_memory_bytes
        print(peak_memory_bytes())
        used = numpy.ones(200 << 20, numpy.uint8)
        print(peak_memory_bytes())
        del used
        print(peak_memory_bytes())
    """
    used = np.ones(500 << 20, np.uint8)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    before, during, after = map(int, done.stdout.split())
    assert 1 << 20 < before < 200 << 20 < during < used.nbytes
    assert after > 200 << 20


@pytest.fixture
def full_run(tmp_path: Path, make_config: Any) -> Run:
    """A run with a checkpoint, whose next files are written to a device that is always full."""
    run = Run(tmp_path / "run", make_config())
    run.save(Position(0, 200), STATE)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    for name in ("checkpoint.pt", "figures.json"):
        (run.path / f"{name}.partial").symlink_to("/dev/full")
    return run


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.save(Position(0, 400), STATE),
        lambda run: run.write("figures.json", {"probe": 0.5}),
        lambda run: run.log({"step": 1}),
    ],
    ids=["checkpoint", "figures", "log"],
)
def test_full_disk_is_reported_with_folder_and_remedy_and_leaves_the_checkpoint(full_run: Run, write: Any) -> None:
    expected = rf"no space left on device: [\d,]+ MB free in {full_run.path}\. Make space, then run the same command"
    with pytest.raises(RunError, match=expected), full_disk_reported(full_run.path):
        write(full_run)
    position, state = full_run.checkpoint() or pytest.fail("the previous checkpoint is lost")
    assert position == Position(0, 200)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


def test_failed_replacement_leaves_the_old_content_and_no_partial_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_limit_of_file_sizes_is_reported_for_every_library(tmp_path: Path) -> None:
    code = """if True:
        import numpy, safetensors.torch, torch
        from pathlib import Path
        from concord.training.errors import RunError
        from concord.training.machine import full_disk_reported
        weight = torch.zeros(1 << 20)
        for write in (
            lambda: torch.save({"weight": weight}, open("file", "wb")),
            lambda: safetensors.torch.save_file({"weight": weight}, "file"),
            lambda: numpy.savez("file", weight=weight.numpy()),
        ):
            try:
                with full_disk_reported(Path()):
                    write()
            except RunError as error:
                print(error)
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit,
    )
    assert len(re.findall(r"^file too large: [\d,]+ MB free in \.\. Make space", done.stdout, re.MULTILINE)) == 3, done.stderr


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    for error in (FileNotFoundError("missing"), RuntimeError("shape"), KeyError("name")):
        with pytest.raises(type(error)), full_disk_reported(tmp_path):
            raise error


def test_fit_on_a_full_disk_stops_with_a_message_and_continues_after_space_is_made(
    make_config: Any, write_config: Any, tmp_path: Path
) -> None:
    """The folder of the run is a file system that holds one checkpoint, but not the next one too."""
    folder = tmp_path / "small"
    folder.mkdir()
    stage = {"epochs": 1, "batch_size": 60}
    changes = {"joint": stage, "refiner": {**stage, "steps": 1}, "align": stage, "network": {"hidden": 64}}
    settings, config = make_config(**changes), write_config(tmp_path / "c.toml", **changes)
    model = fit.build(settings, settings.modalities)
    size = int(1.5 * sum(weight.nbytes for weight in model.state_dict().values()))
    command = shlex.join([sys.executable, "-m", "concord.service", "fit", str(config), "--out", str(folder / "run")])
    script = f"""
        mount -t tmpfs -o size={size} tmpfs {folder} || exit 99
        {command} 2> {tmp_path}/first
        echo $? > {tmp_path}/code
        cp {folder}/run/checkpoint.pt {tmp_path}/checkpoint.pt
        ls {folder}/run > {tmp_path}/files
        mount -o remount,size=50m {folder}
        {command} 2> {tmp_path}/second && cp {folder}/run/evaluation.json {tmp_path}
    """
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TMPFS, "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    first = (tmp_path / "first").read_text()
    assert (tmp_path / "code").read_text() == "2\n", first
    assert f"error: no space left on device: 0 MB free in {folder / 'run'}. Make space, then run the same command" in first
    assert "Traceback" not in first
    assert "checkpoint.pt.partial" not in (tmp_path / "files").read_text()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["stage"] >= 1
    assert done.returncode == 0, (tmp_path / "second").read_text()
    assert "continuing at stage" in (tmp_path / "second").read_text()
    assert json.loads((tmp_path / "evaluation.json").read_text())["test_rows"] == 30


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
def test_freed_memory_of_large_tensors_is_reused_in_the_context_and_returned_after_it() -> None:
    """Each page that the system provides is a page fault. A tensor of 64 MB has 16,384 pages."""
    code = (
        "import resource, torch; from concord.training.machine import freed_memory_kept\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20\n"
        "def faults(tensors):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    [torch.ones(1 << 24).sum() for _ in range(tensors)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "start = resident()\n"
        # The first tensors may leave gaps in the heap that are too small for the next ones.
        "with freed_memory_kept(): faults(20); print(faults(8)); print(resident() - start)\n"
        "print(resident() - start); print(faults(8))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    kept, resident_inside, resident_after, default = map(int, result.stdout.split())
    assert kept < 100
    assert default > 8 * 10_000
    assert resident_inside >= 64
    assert resident_after < 32
