"""Training figures for TensorBoard, Weights & Biases and MLflow, by their own libraries, which are optional."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from concord.training.checkpoint import Run
from concord.training.config import Config
from concord.training.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Name of a log -> package of the library."""
_PLACES = {"stage", "stage_index", "step"}
"""Entries of a log line that are no figures."""
Write = Callable[[Mapping[str, float], int], None]
"""Called with figures by name, and the number of training steps done in all stages."""


@contextmanager
def logging_to(name: str | None, run: Run, config: Config) -> Iterator[None]:
    """Send every line of the run's log to a library too, for the duration of the context.

    Args:
        name: of ``PACKAGES``. None: to no library.

    Raises:
        ConfigError: the name is unknown, or the library is not installed.
    """
    if name is None:
        yield
        return
    if name not in PACKAGES:
        raise ConfigError(f"--log: received {name!r}, expected one of {', '.join(PACKAGES)}")
    try:
        write, close = _OPEN[name](run, config)
    except ImportError as error:
        raise ConfigError(f"--log {name}: {error}. Install it: pip install {PACKAGES[name]}") from error
    done: dict[int, int] = {}  # steps by stage

    def listen(line: Mapping[str, Any]) -> None:
        done[line["stage_index"]] = line["step"]
        figures = {f"{line['stage']}/{key}": float(value) for key, value in line.items() if key not in _PLACES}
        write(figures, sum(done.values()))

    for line in run.metrics():  # of the part that is done, so that a continued run goes on from there
        done[line["stage_index"]] = line["step"]
    run.listener = listen
    try:
        yield
    finally:
        run.listener = None
        close()


def _tensorboard(run: Run, _: Config) -> tuple[Write, Callable[[], None]]:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(run.path / "tensorboard"))

    def write(figures: Mapping[str, float], step: int) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, step)
        writer.flush()

    return write, writer.close


def _wandb(run: Run, config: Config) -> tuple[Write, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    opened = wandb.init(
        project="concord",
        name=run.path.name,
        id=f"{run.path.name}-{config.sha256[:8]}",
        resume="allow",
        dir=str(run.path),
        config=config.model_dump(mode="json"),
    )
    return lambda figures, step: opened.log(dict(figures), step=step), opened.finish


def _mlflow(run: Run, config: Config) -> tuple[Write, Callable[[], None]]:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment("concord")
    mlflow.start_run(run_name=run.path.name)
    mlflow.log_params({"config": config.sha256, "model": config.model, "seed": config.seed})
    # MLflow rejects names with other characters than letters, digits, _ - . / and spaces.
    return lambda figures, step: mlflow.log_metrics(dict(figures), step=step), mlflow.end_run


_OPEN: dict[str, Callable[[Run, Config], tuple[Write, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
