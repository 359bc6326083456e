"""A run's folder: what was configured, how far it got, what it measured. A reader finds each file whole or not at all.

::

    config.json       the configuration, and its hash
    checkpoint.pt     model, optimiser and position; tensors and plain values alone, loaded without running code
    metrics.jsonl     a line every few steps
    evaluation.json   figures on the test split
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import Config


class RunError(Exception):
    """A run's folder that cannot be continued. The message says what to do."""


@dataclass(frozen=True)
class Position:
    """How far a run got."""

    stage: int = 0
    """Index of the stage to continue; equal to the number of stages when all are done."""
    step: int = 0
    """Steps taken in that stage."""


class Run:
    """The folder of one run; made when missing.

    Raises:
        RunError: the folder belongs to a run with another configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._checkpoint = path / "checkpoint.pt"
        self._metrics = path / "metrics.jsonl"
        path.mkdir(parents=True, exist_ok=True)
        stated = path / "config.json"
        if stated.exists():
            try:
                other = json.loads(stated.read_text())["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{stated}: damaged ({error!r}). Name another folder with --out, or start over") from error
            if other != config.sha256:
                raise RunError(
                    f"{path}: holds a run with another configuration (sha256 {other[:12]}, this one {config.sha256[:12]}). "
                    "Name another folder with --out, or start over with --fresh"
                )
        else:
            write_atomically(stated, json.dumps({"sha256": config.sha256, **config.model_dump(mode="json")}, indent=1))

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step."""
        partial = self._checkpoint.with_suffix(".partial")
        with partial.open("wb") as stream:
            torch.save({"stage": position.stage, "step": position.step, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._checkpoint)

    def resume(self) -> tuple[Position, dict[str, Any]] | None:
        """The last checkpoint, to go on from. Metrics written after it are dropped: they will be written again."""
        saved = self.checkpoint()
        if saved is None:
            self._metrics.unlink(missing_ok=True)
            return None
        at = (saved[0].stage, saved[0].step)
        kept = [line for line in self.metrics() if (line["stage_index"], line["step"]) <= at]
        write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        return saved

    def checkpoint(self) -> tuple[Position, dict[str, Any]] | None:
        """The last checkpoint, or None at the beginning. Changes nothing, so that a run under way can be looked at.

        Raises:
            RunError: the file is damaged.
        """
        if not self._checkpoint.exists():
            return None
        try:
            state = torch.load(self._checkpoint, weights_only=True)
            position = Position(state.pop("stage"), state.pop("step"))
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{self._checkpoint}: cannot be read ({error}). Remove it, or start over with --fresh") from error
        return position, state

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        with self._metrics.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; a last line cut short by a crash is left out."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cost(self) -> dict[str, Any]:
        """Seconds of training, in all and by stage, and the highest resident memory of any of the run's processes in bytes."""
        stages: dict[str, float] = {}
        for line in (lines := self.metrics()):
            stages[line["stage"]] = stages.get(line["stage"], 0.0) + line["seconds"]
        peak = max((line["peak_memory_bytes"] for line in lines), default=0)
        return {"seconds": sum(stages.values()), "stages": stages, "peak_memory_bytes": peak}

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of results into the folder."""
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of results.

        Raises:
            RunError: it was not written yet, or is damaged.
        """
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError as error:
            raise RunError(f"{self.path / name}: not there yet. Run fit, then evaluate, first") from error
        except ValueError as error:
            raise RunError(f"{self.path / name}: damaged ({error}). Run evaluate again") from error
        return content


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old content or the new."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
