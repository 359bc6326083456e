"""A run ends with the same numbers however often it was stopped; what cannot go on says so."""

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

import pytest
import torch

from training import data, fit
from training.checkpoint import Position, Run, RunError
from training.config import Config
from training.fit import DivergenceError
from training.progress import Progress

ROOT = Path(fit.__file__).parent.parent
TIMES = {"seconds", "examples_per_second", "peak_memory_bytes"}


LOADED: dict[str, data.Dataset] = {}


def rows(settings: Config) -> data.Dataset:
    """Read once: most runs here differ in nothing but where they stop."""
    if settings.sha256 not in LOADED:
        LOADED[settings.sha256] = data.load(settings, "train")
    return LOADED[settings.sha256]


def train(settings: Config, run: Run) -> Any:
    return fit.fit(settings, rows(settings), run, Progress())


def numbers(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights, and metrics but for the times."""
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(len({line["stage"] for line in run.metrics()}), 0)
    return state["model"], [{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics()]


def assert_same(run: Run, other: Run) -> None:
    (weights, metrics), (expected, told) = numbers(run), numbers(other)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert metrics == told


@pytest.fixture(scope="module", autouse=True)
def _frequent() -> Iterator[None]:
    """Checkpoints every 6 of the 16 steps that each stage takes here, in 4 epochs: in the middle of an epoch too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 3)
        patch.setattr(fit, "CHECKPOINT_STEPS", 6)
        yield


@pytest.fixture(scope="module")
def settings(make_config: Any) -> Config:
    stage = {"epochs": 4, "batch_size": 15, "learning_rate": 0.01}
    found: Config = make_config(joint=stage, refiner={**stage, "steps": 1}, align=stage, refresh=stage, flow=stage)
    return found


@pytest.fixture(scope="module")
def straight(settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing stopped."""
    run = Run(tmp_path_factory.mktemp("straight"), settings)
    train(settings, run)
    return run


class CrashError(Exception):
    pass


class Fragile(Run):
    """Crashes at one place: before or after a line of metrics or a checkpoint reaches the disk."""

    def __init__(self, path: Path, settings: Config, place: tuple[str, int, int, str]) -> None:
        super().__init__(path, settings)
        self.what, self.stage, self.step, self.when = place

    def log(self, line: Mapping[str, Any]) -> None:
        self._do("log", line["stage_index"], line["step"], lambda: super(Fragile, self).log(line))

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        self._do("save", position.stage, position.step, lambda: super(Fragile, self).save(position, state))

    def _do(self, what: str, stage: int, step: int, act: Any) -> None:
        here = (what, stage, step) == (self.what, self.stage, self.step)
        if here and self.when == "before":
            raise CrashError
        act()
        if here:
            raise CrashError


@pytest.mark.parametrize(
    "places",
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
def test_a_crash_changes_nothing(straight: Run, settings: Config, tmp_path: Path, places: list[Any]) -> None:
    for place in places:
        with pytest.raises(CrashError):
            train(settings, Fragile(tmp_path / "run", settings, place))
    run = Run(tmp_path / "run", settings)
    train(settings, run)
    assert_same(run, straight)


def test_every_stage_logs_to_its_end(straight: Run) -> None:
    _, metrics = numbers(straight)
    assert [(m["stage"], m["step"]) for m in metrics] == [
        (name, step) for name in ("joint", "refiner", "align", "refresh", "flow") for step in (3, 6, 9, 12, 15, 16)
    ]
    assert metrics[5]["epoch"] == 4


def test_training_helps(straight: Run) -> None:
    elbos = [line["elbo"] for line in straight.metrics() if line["stage"] == "joint"]
    assert elbos == sorted(elbos)
    assert elbos[-1] > elbos[0] + 10


def test_weight_decay_keeps_weights_small(straight: Run, settings: Config, tmp_path: Path) -> None:
    stages = {
        name: getattr(settings, name).model_copy(update={"weight_decay": 5.0})
        for name in ("joint", "refiner", "align", "refresh", "flow")
    }
    other = settings.model_copy(update=stages)
    run = Run(tmp_path, other)
    train(other, run)

    def size(of: Run) -> float:
        return sum(float(weight.square().sum()) for weight in numbers(of)[0].values())

    assert size(run) < 0.7 * size(straight)


def test_another_seed_gives_other_numbers(straight: Run, settings: Config, tmp_path: Path) -> None:
    other = settings.model_copy(update={"seed": 1})
    run = Run(tmp_path, other)
    train(other, run)
    assert numbers(run)[1] != numbers(straight)[1]


def test_a_finished_run_is_loaded_and_an_unfinished_one_is_not(straight: Run, settings: Config, tmp_path: Path) -> None:
    vae = fit.load(settings, rows(settings), straight) or pytest.fail("the run has finished")
    assert not vae.training
    expected, _ = numbers(straight)
    assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())
    unfinished = Fragile(tmp_path, settings, ("log", 1, 9, "after"))
    with pytest.raises(CrashError):
        train(settings, unfinished)
    metrics = unfinished.metrics()
    assert fit.load(settings, rows(settings), unfinished) is None
    assert unfinished.metrics() == metrics  # looked at, not touched


def test_a_finished_run_is_not_trained_again(straight: Run, settings: Config) -> None:
    before = (straight.path / "checkpoint.pt").read_bytes()
    metrics = (straight.path / "metrics.jsonl").read_text()
    train(settings, straight)
    assert torch.equal(
        *(state["joint.absent"] for state in (numbers(straight)[0], torch.load(straight.path / "checkpoint.pt")["model"]))
    )
    assert len((straight.path / "checkpoint.pt").read_bytes()) == len(before)
    assert (straight.path / "metrics.jsonl").read_text() == metrics


def test_the_aligned_encoder_starts_from_the_joint_one(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = fit.stages, []

    def watched(vae: Any, plan: Config) -> list[Any]:
        *before, align, refresh, flow = honest(vae, plan)

        def loss(batch: Any, generator: torch.Generator) -> Any:
            pairs = zip(vae.aligned.parameters(), vae.joint.parameters(), strict=True)
            seen.append(all(torch.equal(aligned, joint) for aligned, joint in pairs))
            return align.loss(batch, generator)

        return [*before, type(align)(align.name, align.settings, loss), refresh, flow]

    monkeypatch.setattr(fit, "stages", watched)
    train(settings, Run(tmp_path, settings))
    assert seen == [True] + [False] * 15


def test_a_flow_draws_with_the_spread_of_the_configuration(settings: Config) -> None:
    narrow = settings.model_copy(update={"flow": settings.flow.model_copy(update={"spread": 0.5})})
    assert [fit.build(given, rows(settings)).spread for given in (settings, narrow)] == [1.0, 0.5]


def test_divergence_is_told_with_its_place(make_config: Any, tmp_path: Path) -> None:
    settings = make_config(joint={"learning_rate": 1e30})
    run = Run(tmp_path, settings)
    with pytest.raises(DivergenceError, match=r"stage joint, step \d+: the loss is .*Lower joint\.learning_rate"):
        train(settings, run)
    assert run.checkpoint() is None


def test_broken_weights_are_never_kept(settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss may be finite where its slope is not: the weights break, and the next loss would come too late."""
    honest = fit.stages

    def broken(vae: Any, plan: Config) -> list[Any]:
        joint, *others = honest(vae, plan)

        def loss(batch: Any, generator: torch.Generator) -> Any:
            value, figures = joint.loss(batch, generator)
            steps.append(1)
            return value + ((vae.joint.absent * 0).sum().sqrt() if len(steps) == 10 else 0), figures

        steps: list[int] = []
        return [type(joint)(joint.name, joint.settings, loss), *others]

    monkeypatch.setattr(fit, "stages", broken)
    run = Run(tmp_path, settings)
    with pytest.raises(DivergenceError, match="no longer finite"):
        train(settings, run)
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(0, 6)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_damaged_checkpoint_is_told(settings: Config, tmp_path: Path) -> None:
    run = Run(tmp_path, settings)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"checkpoint\.pt: cannot be read"):
        train(settings, run)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_train(make_config: Any, tmp_path: Path, precision: str) -> None:
    settings = make_config(precision=precision, refresh={"epochs": 2, "batch_size": 20})
    run = Run(tmp_path, settings)
    assert not train(settings, run).training
    weights, metrics = numbers(run)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert len(metrics) == 8


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [fit._schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[fit.WARMUP_STEPS] == 1
    assert rates[: fit.WARMUP_STEPS] == sorted(rates[: fit.WARMUP_STEPS])
    assert rates[fit.WARMUP_STEPS :] == sorted(rates[fit.WARMUP_STEPS :], reverse=True)
    assert rates[-1] < 1e-5
    assert all(0 < fit._schedule(step, 3) <= 1 for step in range(3))


def wait_for(run: Path, stage: int, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process has logged that place."""
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


def heed_interrupts() -> None:
    """A shell's background job, and all that it starts, ignores Ctrl-C; the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_process_killed_again_and_again_ends_with_the_same_numbers(
    make_config: Any, write_config: Any, tmp_path: Path
) -> None:
    """The real command, the real constants, SIGKILL at random moments of every stage, and one Ctrl-C."""
    long = {"batch_size": 4}
    changes: dict[str, Any] = {
        "joint": {**long, "epochs": 15},  # 225 steps
        "refiner": {**long, "epochs": 4, "steps": 1},  # 60
        "align": {**long, "epochs": 10},  # 150: the last signal must find it at work, on a busy machine too
        "refresh": {**long, "epochs": 1},
    }
    settings = make_config(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LOG_STEPS", 50)
        patch.setattr(fit, "CHECKPOINT_STEPS", 200)
        expected = Run(tmp_path / "straight", settings)
        train(settings, expected)
    file, run, dice = write_config(tmp_path / "tiny.toml", **changes), tmp_path / "run", random.Random(0)
    command = [sys.executable, "-m", "training", "fit", str(file), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for stage, step, kill in [(0, 200, signal.SIGKILL), (1, 50, signal.SIGINT), (2, 50, signal.SIGKILL)]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=heed_interrupts,  # noqa: PLW1509 - it takes no lock
        )
        wait_for(run, stage, step, process)
        time.sleep(dice.uniform(0, 0.1))
        process.send_signal(kill)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if kill == signal.SIGINT else -kill), said
        assert b"Traceback" not in said
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing at stage" in done.stderr
    assert_same(Run(run, settings), expected)
