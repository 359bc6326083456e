"""Interrupted runs continue and end with the same numbers. Runs that cannot continue are rejected."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concord.training import fit
from concord.training.checkpoint import Position, Run
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.errors import DivergenceError, RunError
from concord.training.progress import Progress
from concord.training.stages import AlignStage, JointStage
from tests.support.server import ROOT

TIMES = {"seconds", "examples_per_second", "peak_memory_bytes", "waiting_share"}
DATASETS: dict[str, dataset.Dataset] = {}


def training_rows(settings: Config) -> dataset.Dataset:
    """Return the training rows of a configuration, read once."""
    if settings.sha256 not in DATASETS:
        DATASETS[settings.sha256] = dataset.load(settings, "train")
    return DATASETS[settings.sha256]


def train(settings: Config, run: Run) -> Any:
    return fit.fit(settings, training_rows(settings), run, Progress())


def numbers(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the final weights, and the log without times."""
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(len({line["stage"] for line in run.metrics()}), 0)
    return state["model"], [{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics()]


def assert_same(run: Run, other: Run) -> None:
    (weights, metrics), (expected_weights, expected_metrics) = numbers(run), numbers(other)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    assert metrics == expected_metrics


@pytest.fixture(scope="module", autouse=True)
def _frequent_checkpoints() -> Iterator[None]:
    """Write checkpoints every 6 steps. A stage has 16 steps in 4 epochs here, so some are in the middle of an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 3)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        yield


@pytest.fixture(scope="module")
def settings(make_config: Any) -> Config:
    stage = {"epochs": 4, "batch_size": 15, "learning_rate": 0.01}
    config: Config = make_config(joint=stage, refiner={**stage, "steps": 1}, align=stage, refresh=stage, flow=stage)
    return config


@pytest.fixture(scope="module")
def uninterrupted(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without interruption."""
    run = Run(tmp_path_factory.mktemp("uninterrupted"), settings)
    train(settings, run)
    return run


class CrashError(Exception):
    pass


class CrashingRun(Run):
    """A run that crashes once: before or after a log line or a checkpoint is written.

    Args:
        crash: "log" or "save", stage, step, and "before" or "after".
    """

    def __init__(self, path: Path, settings: Config, crash: tuple[str, int, int, str]) -> None:
        super().__init__(path, settings)
        self.operation, self.stage, self.step, self.when = crash

    def log(self, line: Mapping[str, Any]) -> None:
        self._run("log", line["stage_index"], line["step"], lambda: super(CrashingRun, self).log(line))

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        self._run("save", position.stage, position.step, lambda: super(CrashingRun, self).save(position, state))

    def _run(self, operation: str, stage: int, step: int, action: Any) -> None:
        crashes = (operation, stage, step) == (self.operation, self.stage, self.step)
        if crashes and self.when == "before":
            raise CrashError
        action()
        if crashes:
            raise CrashError


@pytest.mark.parametrize(
    "crashes",
    [
        [("log", 0, 3, "after"), ("log", 0, 9, "after")],
        [("save", 0, 6, "before"), ("save", 0, 6, "after"), ("log", 0, 16, "after")],
        [("save", 1, 0, "before"), ("save", 1, 0, "after"), ("log", 1, 9, "before"), ("save", 1, 12, "after")],
        [("log", 2, 3, "after"), ("save", 2, 12, "before"), ("log", 2, 16, "after"), ("save", 3, 0, "before")],
        [("save", 3, 0, "after"), ("log", 3, 9, "before"), ("save", 3, 12, "after")],
        [("save", 4, 0, "after"), ("log", 4, 9, "before"), ("save", 4, 12, "after"), ("save", 5, 0, "after")],
    ],
    ids=str,
)
def test_run_after_crashes_ends_with_the_same_numbers(
    uninterrupted: Run, settings: Config, tmp_path: Path, crashes: list[Any]
) -> None:
    for crash in crashes:
        with pytest.raises(CrashError):
            train(settings, CrashingRun(tmp_path / "run", settings, crash))
    run = Run(tmp_path / "run", settings)
    train(settings, run)
    assert_same(run, uninterrupted)


def test_run_after_crashes_between_log_lines_ends_with_the_same_numbers(
    uninterrupted: Run, settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that are due by the clock lie between two lines of the log, and in the middle of an epoch."""
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0.0)
    for stage, step in [(0, 7), (1, 5), (1, 14), (2, 11), (3, 1), (4, 13)]:
        with pytest.raises(CrashError):
            train(settings, CrashingRun(tmp_path, settings, ("save", stage, step, "after")))
        position, _ = Run(tmp_path, settings).checkpoint() or pytest.fail("no checkpoint")
        assert position == Position(stage, step)
    run = Run(tmp_path, settings)
    train(settings, run)
    assert_same(run, uninterrupted)
    assert all(line["seconds"] > 0 for line in run.metrics())


def test_checkpoints_are_written_in_time_however_long_a_step_takes(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the 16 steps of the first stage reaches ``CHECKPOINT_STEPS``."""
    assert fit.CHECKPOINT_SECONDS == 60
    times, limit = [time.monotonic()], 0.4
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 1000)
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", limit)
    original = JointStage.__call__

    def slow_call(stage: JointStage, batch: Any, noise: Any) -> Any:
        time.sleep(0.1)
        return original(stage, batch, noise)

    class TimedRun(Run):
        def save(self, position: Position, state: Mapping[str, Any]) -> None:
            times.append(time.monotonic())
            super().save(position, state)
            if position.stage:
                raise CrashError

    monkeypatch.setattr(JointStage, "__call__", slow_call)
    run = TimedRun(tmp_path, settings)
    with pytest.raises(CrashError):
        train(settings, run)
    gaps = np.diff(times[1:])
    assert len(times) > 4
    assert gaps.max() < limit + 0.2, "the slack is for a loaded machine"


@pytest.mark.parametrize(
    ("threads", "variable", "expected"),
    [(None, "1", 1), (None, "3,1", 3), (2, "1", 2), (None, None, None), (None, "many", None), (None, "0", None)],
)
def test_fit_takes_the_threads_of_the_configuration_then_of_the_environment(
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    variable: str | None,
    expected: int | None,
) -> None:
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    stage = {"epochs": 1, "batch_size": 60}
    settings = make_config(threads=threads, joint=stage, refiner={**stage, "steps": 0}, align=stage)
    before, used = torch.get_num_threads(), []
    original = JointStage.__call__

    def recording_call(stage: JointStage, batch: Any, noise: Any) -> Any:
        used.append(torch.get_num_threads())
        return original(stage, batch, noise)

    monkeypatch.setattr(JointStage, "__call__", recording_call)
    try:
        fit.fit(settings, dataset.load(settings, "train"), Run(tmp_path, settings), Progress(quiet=True))
    finally:
        torch.set_num_threads(before)
    assert used == [expected or len(os.sched_getaffinity(0))]


def test_every_stage_logs_until_its_last_step(uninterrupted: Run) -> None:
    _, metrics = numbers(uninterrupted)
    assert [(m["stage"], m["step"]) for m in metrics] == [
        (name, step) for name in ("joint", "refiner", "align", "refresh", "flow") for step in (3, 6, 9, 12, 15, 16)
    ]
    assert metrics[5]["epoch"] == 4


def test_joint_stage_raises_the_elbo(uninterrupted: Run) -> None:
    elbos = [line["elbo"] for line in uninterrupted.metrics() if line["stage"] == "joint"]
    assert elbos == sorted(elbos)
    assert elbos[-1] > elbos[0] + 10


def test_weight_decay_reduces_the_norm_of_the_weights(uninterrupted: Run, settings: Config, tmp_path: Path) -> None:
    stages = {
        name: getattr(settings, name).model_copy(update={"weight_decay": 5.0})
        for name in ("joint", "refiner", "align", "refresh", "flow")
    }
    other = settings.model_copy(update=stages)
    run = Run(tmp_path, other)
    train(other, run)

    def squared_norm(run: Run) -> float:
        return sum(float(weight.square().sum()) for weight in numbers(run)[0].values())

    assert squared_norm(run) < 0.7 * squared_norm(uninterrupted)


def test_another_seed_changes_the_numbers(uninterrupted: Run, settings: Config, tmp_path: Path) -> None:
    other = settings.model_copy(update={"seed": 1})
    run = Run(tmp_path, other)
    train(other, run)
    assert numbers(run)[1] != numbers(uninterrupted)[1]


def test_load_returns_the_model_of_a_finished_run_only(uninterrupted: Run, settings: Config, tmp_path: Path) -> None:
    modalities = training_rows(settings).modalities
    model = fit.load(settings, modalities, uninterrupted) or pytest.fail("the run has finished")
    assert not model.training
    expected, _ = numbers(uninterrupted)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    unfinished = CrashingRun(tmp_path, settings, ("log", 1, 9, "after"))
    with pytest.raises(CrashError):
        train(settings, unfinished)
    metrics = unfinished.metrics()
    assert fit.load(settings, modalities, unfinished) is None
    assert unfinished.metrics() == metrics, "load() changes no file"


def test_fit_of_a_finished_run_trains_nothing(uninterrupted: Run, settings: Config) -> None:
    checkpoint, log = uninterrupted.path / "checkpoint.pt", uninterrupted.path / "metrics.jsonl"
    weights, size, lines = numbers(uninterrupted)[0], checkpoint.stat().st_size, log.read_text()
    train(settings, uninterrupted)
    assert all(torch.equal(weight, weights[name]) for name, weight in numbers(uninterrupted)[0].items())
    assert checkpoint.stat().st_size == size
    assert log.read_text() == lines


def test_aligned_encoder_is_initialised_from_the_joint_encoder_once(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, equal = AlignStage.__call__, []

    def recording_call(stage: AlignStage, batch: Any, noise: Any) -> Any:
        pairs = zip(stage.model.aligned.parameters(), stage.model.joint.parameters(), strict=True)
        equal.append(all(torch.equal(aligned, joint) for aligned, joint in pairs))
        return original(stage, batch, noise)

    monkeypatch.setattr(AlignStage, "__call__", recording_call)
    train(settings, Run(tmp_path, settings))
    assert equal == [True] + [False] * 15


def test_flow_has_the_spread_of_the_configuration(settings: Config) -> None:
    narrow = settings.model_copy(update={"flow": settings.flow.model_copy(update={"spread": 0.5})})
    modalities = training_rows(settings).modalities
    assert [fit.build(config, modalities).spread for config in (settings, narrow)] == [1.0, 0.5]


def test_diverging_loss_is_reported_with_stage_and_step(make_config: Any, tmp_path: Path) -> None:
    settings = make_config(joint={"learning_rate": 1e30})
    run = Run(tmp_path, settings)
    with pytest.raises(DivergenceError, match=r"stage joint, step \d+: the loss is .*Lower joint\.learning_rate"):
        train(settings, run)
    assert run.checkpoint() is None


def test_weights_that_are_not_finite_are_never_saved(settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss can have an infinite gradient. The weights break one step before the loss does."""
    original, steps = JointStage.__call__, []

    def breaking_call(stage: JointStage, batch: Any, noise: Any) -> Any:
        loss, figures = original(stage, batch, noise)
        steps.append(1)
        return loss + ((stage.model.joint.absent * 0).sum().sqrt() if len(steps) == 10 else 0), figures

    monkeypatch.setattr(JointStage, "__call__", breaking_call)
    run = Run(tmp_path, settings)
    with pytest.raises(DivergenceError, match="no longer finite"):
        train(settings, run)
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(0, 6)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_fit_rejects_a_damaged_checkpoint(settings: Config, tmp_path: Path) -> None:
    run = Run(tmp_path, settings)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"checkpoint\.pt: cannot be read"):
        train(settings, run)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_works_in_both_precisions(make_config: Any, tmp_path: Path, precision: str) -> None:
    settings = make_config(precision=precision, refresh={"epochs": 2, "batch_size": 20})
    run = Run(tmp_path, settings)
    assert not train(settings, run).training
    weights, metrics = numbers(run)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert len(metrics) == 8


def test_moments_lie_in_memory_as_their_weight_does() -> None:
    """A GPU trains in channels-last memory and a CPU does not. CUDA's fused kernel rejects moments that lie otherwise."""
    rows = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizers = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizers.append(fit.adamw(model, 0.01))
        model(rows).sum().backward()
    optimizers[0].step()
    saved = optimizers[0].state_dict()
    fit.load_optimizer_state(optimizers[1], saved)
    for index, (weight, moments) in enumerate(optimizers[1].state.items()):
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].stride() == weight.stride()
            torch.testing.assert_close(moments[name], saved["state"][index][name])
    optimizers[1].step()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_works_with_blocks_and_other_likelihoods_of_pictures(make_config: Any, tmp_path: Path, precision: str) -> None:
    """Pairs of every two of digit, photo and word. A learned scale leaves its initial value."""
    settings = make_config(photo=True, tables=True, precision=precision, network={"blocks": 1, "width": 4})
    digit, photo, word = settings["modalities"]
    digit |= {"likelihood": "logistic_mixture", "components": 2}
    photo |= {"learned_scale": "channel"}
    settings = Config.model_validate({**settings, "modalities": [digit, photo, word]})
    run = Run(tmp_path, settings)
    model = train(settings, run)
    weights, metrics = numbers(run)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert len(metrics) == 6
    untrained = fit.build(settings, model.modalities).decoders["photo"].log_scale
    assert (model.decoders["photo"].log_scale < untrained).all()


def test_learning_rate_rises_to_its_peak_then_decays_to_zero() -> None:
    rates = [fit._learning_rate_factor(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[fit.WARMUP_STEPS] == 1
    assert rates[: fit.WARMUP_STEPS] == sorted(rates[: fit.WARMUP_STEPS])
    assert rates[fit.WARMUP_STEPS :] == sorted(rates[fit.WARMUP_STEPS :], reverse=True)
    assert rates[-1] < 1e-5
    assert all(0 < fit._learning_rate_factor(step, 3) <= 1 for step in range(3))


def wait_for(run: Path, stage: int, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has logged a step of a stage."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines()
            if lines and lines[-1].endswith("}"):
                last = json.loads(lines[-1])
                if (last["stage_index"], last["step"]) >= (stage, step):
                    return
        time.sleep(0.005)
    pytest.fail(f"never logged stage {stage}, step {step}")


def restore_interrupts() -> None:
    """Restore the handling of Ctrl-C: background jobs of a shell and their children ignore it, and the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_command_killed_repeatedly_ends_with_the_same_numbers(make_config: Any, write_config: Any, tmp_path: Path) -> None:
    """The unpatched command, with SIGKILL at random moments of two stages and Ctrl-C in another."""
    long = {"batch_size": 4}
    changes: dict[str, Any] = {
        "joint": {**long, "epochs": 15},  # 225 steps
        "refiner": {**long, "epochs": 4, "steps": 1},  # 60
        "align": {**long, "epochs": 10},  # 150, so that the last signal arrives during training on a slow machine too
        "refresh": {**long, "epochs": 1},
    }
    settings = make_config(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 50)
        patch.setattr(fit, "CHECKPOINT_STEPS", 200)
        expected = Run(tmp_path / "uninterrupted", settings)
        train(settings, expected)
    file, run, generator = write_config(tmp_path / "tiny.toml", **changes), tmp_path / "run", random.Random(0)
    command = [sys.executable, "-m", "concord.service", "fit", str(file), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for stage, step, kill in [(0, 200, signal.SIGKILL), (1, 50, signal.SIGINT), (2, 50, signal.SIGKILL)]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=restore_interrupts,  # noqa: PLW1509 - it takes no lock
        )
        wait_for(run, stage, step, process)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(kill)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if kill == signal.SIGINT else -kill), stderr
        assert b"Traceback" not in stderr
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing at stage" in done.stderr
    assert_same(Run(run, settings), expected)
