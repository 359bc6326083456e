"""Splitting a batch between processes or into micro-batches changes rounding only."""

import json
import math
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

from concord.training import fit
from concord.training.checkpoint import Position, Run
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.distributed import Noise, ProcessGroup
from concord.training.errors import ConfigError, RunError
from concord.training.progress import Progress
from tests.support.server import ROOT

STAGES = ("joint", "refiner", "align")
STEPS = 15  # per stage, 3 per epoch
PLAN: dict[str, Any] = {
    "joint": {"epochs": 5, "batch_size": 20},
    "refiner": {"epochs": 5, "batch_size": 20, "steps": 1},
    "align": {"epochs": 5, "batch_size": 20},
}
CONTRAST_PLAN: dict[str, Any] = {
    **{name: {**stage, "epochs": 2} for name, stage in PLAN.items()},
    "refiner": {**PLAN["refiner"], "epochs": 2, "share": 0.5},
    "contrast": {"epochs": 2, "batch_size": 20, "prediction": 1.0},
    "align": {"epochs": 2, "batch_size": 20, "contrast_weight": 1.0, "dropout": 0.2},
    "validation": {"rows": 7},
}
# Biases before a normalisation, which removes them: their gradient is rounding noise, and Adam scales it to full steps.
WITHOUT_GRADIENT = re.compile(r"trunks\.digit\.(1|4|7)\.bias")
# The command with more frequent checkpoints, so that tiny runs have some. Its evaluation is the same in every run.
COMMAND = """
import os, sys
from pathlib import Path
from concord.training import commands, fit
fit.LOG_STEPS, fit.CHECKPOINT_STEPS = 2, 6
if "WITHOUT_EVALUATION" in os.environ:
    commands._evaluate = lambda *_: None
from concord.training.cli import app
try:
    app()
finally:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("threads of the process group:", [name for name in names if "gloo" in name], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def settings(make_config: Any) -> Config:
    config: Config = make_config(**PLAN)
    return config


@pytest.fixture(scope="module")
def single(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a single process with whole batches."""
    return train(settings, tmp_path_factory.mktemp("single"))


@pytest.fixture(autouse=True)
def _frequent_checkpoints() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 2)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        yield


def train(settings: Config, folder: Path) -> Run:
    run = Run(folder, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 2)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        fit.fit(settings, dataset.load(settings, "train"), run, Progress(quiet=True))
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position in (Position(3, 0), Position(4, 0))
    model: dict[str, torch.Tensor] = state["model"]
    return model


def figures(run: Run) -> list[dict[str, Any]]:
    times = {"seconds", "examples_per_second", "peak_memory_bytes", "waiting_share"}
    return [{name: value for name, value in line.items() if name not in times} for line in run.metrics()]


def assert_close(run: Run, expected: Run) -> None:
    values = weights(run)
    for name, weight in weights(expected).items():
        if not WITHOUT_GRADIENT.search(name):
            torch.testing.assert_close(
                values[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert [line.keys() for line in figures(run)] == [line.keys() for line in figures(expected)]
    for line, expected_line in zip(figures(run), figures(expected), strict=True):
        assert line.pop("stage") == expected_line.pop("stage")
        assert line == pytest.approx(expected_line, rel=1e-5, abs=2e-4)


def start_torchrun(processes: int, config: Path, run: Path, **variables: str) -> subprocess.Popen[str]:
    """Start the command under torchrun, in a separate process group of the operating system."""
    script = config.with_suffix(".py")
    script.write_text(COMMAND)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, str(script), "fit", str(config), "--out", str(run)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(run.parent / "cache"),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_end(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err


def kill_at(process: subprocess.Popen[str], run: Path, stage: int, step: int) -> None:
    """Kill torchrun and its processes with SIGKILL when a step of a stage is logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        file = run / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        if lines and (json.loads(lines[-1])["stage_index"], json.loads(lines[-1])["step"]) >= (stage, step):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(workers) == 2
            for group in [process.pid, *map(int, workers)]:  # each worker has a separate process group
                os.killpg(group, signal.SIGKILL)
            process.communicate(timeout=60)
            return
        time.sleep(0.002)
    pytest.fail(f"never logged stage {stage}, step {step}")


@pytest.fixture(scope="module")
def parallel(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, str]:
    """The same run with two processes, and its output."""
    folder = tmp_path_factory.mktemp("parallel")
    out, err = wait_for_end(start_torchrun(2, write_config(folder / "tiny.toml", **PLAN), folder / "run"))
    return open_run(folder / "run"), out, err


def open_run(path: Path) -> Run:
    stored = json.loads((path / "config.json").read_text())
    return Run(path, Config.model_validate({key: value for key, value in stored.items() if key != "sha256"}))


def test_two_processes_give_the_result_of_one(parallel: tuple[Run, str, str], single: Run) -> None:
    assert_close(parallel[0], single)


def test_only_rank_zero_prints_and_writes(parallel: tuple[Run, str, str]) -> None:
    run, out, err = parallel
    assert out.count("export it with") == 1
    assert err.count(f"joint: step {STEPS} of {STEPS}") == 1
    assert "Traceback" not in err
    places = [(line["stage"], line["step"]) for line in run.metrics()]
    assert places == [(name, step) for name in STAGES for step in (2, 4, 6, 8, 10, 12, 14, STEPS)]
    assert (run.path / "evaluation.json").exists()


def test_process_group_stops_its_threads(parallel: tuple[Run, str, str]) -> None:
    """Threads that are left sometimes abort the exit of the interpreter."""
    assert parallel[2].count("threads of the process group: []") == 2


@pytest.fixture(scope="module")
def killed(write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes that were killed in the second of three stages. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at(start_torchrun(2, write_config(folder / "tiny.toml", **PLAN), folder / "run"), folder / "run", 1, 8)
    return folder


def test_two_killed_processes_continue_with_the_same_numbers(
    killed: Path, parallel: tuple[Run, str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    _, err = wait_for_end(start_torchrun(2, folder / "tiny.toml", folder / "run", WITHOUT_EVALUATION="1"))
    assert err.count("continuing at stage 2 of 3, step ") == 1
    run = open_run(folder / "run")
    assert all(torch.equal(weight, weights(parallel[0])[name]) for name, weight in weights(run).items())
    assert figures(run) == figures(parallel[0])


def test_one_process_continues_a_run_of_two(killed: Path, single: Run, settings: Config, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed / "run", tmp_path / "run"))
    assert_close(train(settings, run), single)


def test_micro_batches_give_the_result_of_whole_batches(settings: Config, single: Run, tmp_path: Path) -> None:
    changes = {name: getattr(settings, name).model_copy(update={"accumulate": 4}) for name in STAGES}
    assert_close(train(settings.model_copy(update=changes), tmp_path), single)


@pytest.fixture(scope="module")
def contrasted(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a single process with whole batches, whose losses compare the rows of a batch with each other."""
    return train(make_config(**CONTRAST_PLAN), tmp_path_factory.mktemp("contrasted"))


def test_contrast_in_micro_batches_gives_the_result_of_whole_batches(make_config: Any, contrasted: Run, tmp_path: Path) -> None:
    split = {name: {**stage, "accumulate": 4} if name != "validation" else stage for name, stage in CONTRAST_PLAN.items()}
    assert_close(train(make_config(**split), tmp_path), contrasted)


def test_contrast_in_two_processes_gives_the_result_of_one(write_config: Any, contrasted: Run, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", **CONTRAST_PLAN)
    wait_for_end(start_torchrun(2, config, tmp_path / "run", WITHOUT_EVALUATION="1"))
    assert_close(open_run(tmp_path / "run"), contrasted)


def test_micro_batches_of_unequal_size_weigh_all_rows_equally(make_config: Any, tmp_path: Path) -> None:
    """An epoch of 60 rows with a batch size of 77 is one batch, here in seven micro-batches."""
    stage = {"epochs": 3, "batch_size": 77}
    whole, split = (make_config(**{name: {**stage, "accumulate": accumulate} for name in STAGES}) for accumulate in (1, 7))
    assert_close(train(split, tmp_path / "split"), train(whole, tmp_path / "whole"))


def test_noise_of_micro_batches_is_that_of_the_whole_batch() -> None:
    def sample(micro_batch: slice | None) -> list[torch.Tensor]:
        noise = Noise(3, 10, micro_batch)
        order = noise.order(5)
        return [noise.normal(2, 3), noise.choices(4), noise.normal(1), noise.dropout(0.5, 3), order]

    *rows, order = sample(None)
    for first, second, whole in zip(sample(slice(0, 4))[:4], sample(slice(4, 10))[:4], rows, strict=True):
        assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(sample(slice(4, 10))[4], order)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7])
def test_split_chooses_each_row_with_its_probability_and_evenly(share: float) -> None:
    rows, draws = 7, 4000
    counts, sizes = torch.zeros(rows), set()
    for seed in range(draws):
        chosen, others = Noise(seed, rows).split(share)
        assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(rows))
        counts[chosen] += 1
        sizes.add(len(chosen))
    torch.testing.assert_close(counts / draws, torch.full((rows,), share), rtol=0, atol=0.03)
    assert sizes <= {math.floor(share * rows), math.ceil(share * rows)}


def test_split_of_micro_batches_is_that_of_the_whole_batch() -> None:
    whole, others = Noise(5, 10).split(0.5)
    parts = [Noise(5, 10, micro_batch).split(0.5)[0] + micro_batch.start for micro_batch in (slice(0, 3), slice(3, 10))]
    assert torch.equal(torch.cat(parts), whole)
    noise = Noise(5, 10, slice(3, 10))
    chosen, _ = noise.split(0.5)
    taken, full = noise.take(chosen), Noise(5, 10)
    full.split(0.5)
    assert torch.equal(taken.normal(2), full.normal(2)[chosen + 3])
    assert torch.equal(noise.normal(2), full.normal(2)[3:]), "both continue the same sequence"
    assert len(others)


@pytest.mark.parametrize(("rows", "size", "accumulate"), [(12, 1, 1), (12, 2, 3), (7, 2, 2), (4, 4, 1)])
def test_micro_batches_partition_a_batch(rows: int, size: int, accumulate: int) -> None:
    micro_batches = [part for rank in range(size) for part in ProcessGroup(rank, size).micro_batches(rows, accumulate)]
    assert [row for part in micro_batches for row in range(rows)[part]] == list(range(rows))
    assert len(micro_batches) == size * accumulate


def test_batch_that_cannot_be_split_evenly_is_rejected(make_config: Any, tmp_path: Path) -> None:
    settings = make_config(refiner={"accumulate": 3})
    with pytest.raises(ConfigError, match=r"refiner\.batch_size is 20, .*2 processes.*accumulate = 3.*multiple of 6"):
        ProcessGroup(0, 2).validate(settings)
    with pytest.raises(ConfigError, match="multiple of 3"):
        train(settings, tmp_path)
    with pytest.raises(ConfigError, match=r"batch of 3 rows is too small for 2 processes with accumulate = 2"):
        ProcessGroup(0, 2).micro_batches(3, 2)


def test_all_reduce_stops_when_torchrun_has_ended() -> None:
    with pytest.raises(RunError, match="torchrun has ended: the same command continues"):
        ProcessGroup(0, 2, parent_pid=0).all_reduce([], torch.zeros(1))


def test_baseline_with_micro_batches_is_rejected(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='only model = "concord" can split its batches'):
        train(make_config(model="mopoe", joint={"accumulate": 2}), tmp_path)


def test_processes_with_devices_of_different_kinds_are_rejected(tmp_path: Path) -> None:
    """A pair of processes checks devices of different kinds, then of the same kind."""
    code = (
        "import sys, torch; from torch import distributed as d; from concord.training.distributed import check_devices; "
        "from concord.training.errors import ConfigError; rank, file = int(sys.argv[1]), sys.argv[2]\n"
        "d.init_process_group('gloo', init_method='file://' + file, rank=rank, world_size=2)\n"
        "try: check_devices(torch.device(('cpu', 'cuda')[rank]))\n"
        "except ConfigError as error: print(error)\n"
        "check_devices(torch.device('cuda'))\n"
        "d.destroy_process_group()"  # its threads sometimes abort the exit of the interpreter
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all("the processes of torchrun have the devices cpu, cuda" in out for out, _ in outputs), outputs
    assert all(process.returncode == 0 for process in processes), outputs
