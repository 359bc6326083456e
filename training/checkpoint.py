"""The folder of a run. All files but the log are replaced atomically: a reader sees the old or the new content.

::

    config.json       the configuration and its hash
    checkpoint.pt     model, optimiser and position; tensors and plain values only, loaded without running code
    metrics.jsonl     log of training, one line every few steps
    data.json         hashes of the sources and statistics of the training rows, see ``run_data``
    evaluation.json   figures on the test split
    export.npz        what ``export`` needs from the data, see ``export.ExportInputs``
    lock              held by the command that writes here, see ``run_lock``
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from concord.training.config import Config
from concord.training.errors import RunError
from concord.training.machine import peak_memory_bytes

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"
_MAX_SHOWN = 3
"""Differences in a message."""


@dataclass(frozen=True)
class Position:
    """The progress of a run."""

    stage: int = 0
    """Index of the current stage. The number of stages if all are complete."""
    step: int = 0
    """Completed steps of this stage."""


class Run:
    """The folder of one run. Created if it does not exist.

    Attributes:
        path: of the folder.
        listener: called with every line of the log.

    Raises:
        RunError: the folder belongs to a run with another configuration, or its config.json is damaged.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._checkpoint = path / "checkpoint.pt"
        self._metrics = path / "metrics.jsonl"
        self.listener: Callable[[Mapping[str, Any]], None] | None = None
        path.mkdir(parents=True, exist_ok=True)
        file = path / CONFIG_FILE
        if file.exists():
            try:
                stored = json.loads(file.read_text())
                sha256 = stored["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{file}: damaged ({error!r}). Name another folder with --out, or start over") from error
            if sha256 != config.sha256 and _hash_now(stored) != config.sha256:
                differences = list(_differences(stored, config.model_dump(mode="json")))
                shown = ", ".join(differences[:_MAX_SHOWN]) + (", …" if differences[_MAX_SHOWN:] else "")
                raise RunError(
                    f"{path}: holds a run with another configuration (sha256 {sha256[:12]}, this one {config.sha256[:12]}"
                    f"{f'; {shown}' if shown else ''}). Pass the options that the run was started with (--seed, --epochs, "
                    "--rows-per-epoch), name another folder with --out, or start over with fit --fresh"
                )
        else:
            write_atomically(file, json.dumps({"sha256": config.sha256, **config.model_dump(mode="json")}, indent=1))

    def save(self, position: Position, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint. If that fails, the previous one stays."""
        with _replacing(self._checkpoint) as stream:
            torch.save({"stage": position.stage, "step": position.step, **state}, stream)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint."""
        return self._checkpoint.exists()

    def resume(self) -> tuple[Position, dict[str, Any]] | None:
        """Return the last checkpoint to continue from it, and remove the log lines after it: training writes them again."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            self._metrics.unlink(missing_ok=True)
            return None
        position, _ = checkpoint
        end = (position.stage, position.step)
        kept = [line for line in self.metrics() if (line["stage_index"], line["step"]) <= end]
        write_atomically(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        return checkpoint

    def checkpoint(self) -> tuple[Position, dict[str, Any]] | None:
        """Return the last checkpoint, None if there is none. Changes no file, so it is safe while the run is training.

        Raises:
            RunError: the file is damaged.
        """
        if not self.has_checkpoint:
            return None
        try:
            state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)  # from any device
            position = Position(state.pop("stage"), state.pop("step"))
        except Exception as error:  # torch raises many types for a damaged file
            raise RunError(f"{self._checkpoint}: cannot be read ({error}). Remove it, or start over with --fresh") from error
        return position, state

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log, and pass it to ``listener``."""
        with self._metrics.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.listener is not None:
            self.listener(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of the log. A last line that a crash left incomplete is ignored."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cost(self) -> dict[str, Any]:
        """Return seconds of training, in total and by stage, and the peak resident memory in bytes.

        The peak is that of this process and of the processes that wrote the log. It includes what this process did before and
        after training: reading the data, and evaluation.
        """
        stages: dict[str, float] = {}
        for line in (lines := self.metrics()):
            stages[line["stage"]] = stages.get(line["stage"], 0.0) + line["seconds"]
        peak = max([peak_memory_bytes(), *(line["peak_memory_bytes"] for line in lines)])
        return {"seconds": sum(stages.values()), "stages": stages, "peak_memory_bytes": peak}

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder."""
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file from the folder.

        Raises:
            RunError: the file does not exist or is damaged.
        """
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text())
        except FileNotFoundError as error:
            raise RunError(f"{self.path / name}: does not exist yet. Run fit or evaluate first") from error
        except ValueError as error:
            raise RunError(f"{self.path / name}: damaged ({error}). Run evaluate again") from error
        return content


def _hash_now(stored: Mapping[str, Any]) -> str | None:
    """Return the hash of a stored configuration by the present rule: earlier versions hashed ``accumulate`` too."""
    try:
        return Config.model_validate({name: value for name, value in stored.items() if name != "sha256"}).sha256
    except ValueError:
        return None


def _differences(stored: Mapping[str, Any], present: Mapping[str, Any], table: str = "") -> Iterator[str]:
    """Iterate over the keys that two configurations have with different values, without those that a run may change."""
    for key in (key for key in present if key in stored and stored[key] != present[key]):
        if f"{table}{key}" in ("version", "device", "data.cache") or key == "accumulate":  # as in Config.sha256
            continue
        if isinstance(stored[key], dict) and isinstance(present[key], dict):
            yield from _differences(stored[key], present[key], f"{table}{key}.")
        else:
            simple = not isinstance(stored[key], dict | list) and not isinstance(present[key], dict | list)
            values = f" is {json.dumps(present[key])} and was {json.dumps(stored[key])}" if simple else " differs"
            yield f"{table}{key}{values}"


def remove_run(path: Path) -> None:
    """Remove the content of a run's folder, but not the lock, which this process holds."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace the content of a file. A reader sees the old or the new content, and so does one after a failure."""
    with _replacing(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces another one when the context ends without an error, and is removed after an error."""
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
