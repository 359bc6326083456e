"""Figures of a run in the libraries that show them. The libraries themselves are replaced: they are optional."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from concord.training.checkpoint import Run
from concord.training.errors import ConfigError
from concord.training.loggers import PACKAGES, logging_to

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def line(stage: int, step: int) -> dict[str, Any]:
    return {"stage": ("joint", "align")[stage], "stage_index": stage, "step": step, "elbo": -1.5 * step, "seconds": 1.0}


def written(library: MagicMock, name: str) -> dict[str, list[tuple[float, int]]]:
    """Return the figures that a library received, with their steps, by name."""
    found: dict[str, list[tuple[float, int]]] = {}
    if name == "tensorboard":
        for call in library.SummaryWriter.return_value.add_scalar.call_args_list:
            found.setdefault(call.args[0], []).append(call.args[1:])
        return found
    log = library.init.return_value.log if name == "wandb" else library.log_metrics
    for call in log.call_args_list:
        for key, value in call.args[0].items():
            found.setdefault(key, []).append((value, call.kwargs["step"]))
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_every_line_reaches_the_library_with_steps_that_go_on_after_an_interruption(
    name: str, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = MagicMock(spec=ModuleType)
    for attribute in ("SummaryWriter", "init", "log_metrics", "set_experiment", "start_run", "log_params", "end_run"):
        setattr(library, attribute, MagicMock())
    monkeypatch.setitem(sys.modules, MODULES[name], library)
    config = make_config()
    run = Run(tmp_path, config)
    with logging_to(name, run, config):
        run.log(line(0, 50))
        run.log(line(0, 100))
    run.log(line(1, 10))  # after the context: not sent
    continued = Run(tmp_path, config)
    with logging_to(name, continued, config):
        continued.log(line(1, 20))
    figures = written(library, name)
    assert figures["joint/elbo"] == [(-75.0, 50), (-150.0, 100)]
    assert figures["align/elbo"] == [(-30.0, 120)]
    assert "joint/stage_index" not in figures
    closed = {"tensorboard": library.SummaryWriter.return_value.close, "wandb": library.init.return_value.finish}
    assert closed.get(name, library.end_run).call_count == 2
    assert len(run.metrics()) == 4


def test_missing_library_and_unknown_name_are_rejected(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"), logging_to("wandb", Run(tmp_path, config), config):
        pass
    unknown = logging_to("csv", Run(tmp_path, config), config)
    with pytest.raises(ConfigError, match="expected one of tensorboard, wandb, mlflow"), unknown:
        pass
