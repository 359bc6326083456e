"""What a run was trained on: the hash of every source, and the statistics that preprocessing learned from the training rows."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from concord.model.bundle.manifest import DataSource
from concord.model.modality import Modality
from concord.training.checkpoint import Run
from concord.training.data.dataset import Dataset
from concord.training.errors import DataError, RunError

FILE = "data.json"
_MODALITIES, _SOURCES = TypeAdapter(tuple[Modality, ...]), TypeAdapter(tuple[DataSource, ...])
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run."""

    modalities: tuple[Modality, ...]
    """With the statistics of the training rows."""
    sources: tuple[DataSource, ...]
    """Of the training rows, then of the test rows unless no process has read them. The hashes are those of the bytes that were
    read."""

    @classmethod
    def from_data(cls, training: Dataset, test: Dataset) -> "RunData":
        """Return the data of both splits.

        Raises:
            DataError: a file changed between the reading of one split and of the other.
        """
        hashes = {source.file: source.sha256 for source in training.sources}
        for source in test.sources:
            if hashes.get(source.file, source.sha256) != source.sha256 or training.modalities != test.modalities:
                raise DataError(f"{source.file}: was changed while it was read. Run the command again")
        return cls(training.modalities, (*training.sources, *test.sources))

    @classmethod
    def from_json(cls, content: Any) -> "RunData":
        """Return what ``to_json`` gave.

        Raises:
            ValueError, KeyError, TypeError: the content is damaged.
        """
        return cls(_MODALITIES.validate_python(content["modalities"]), _SOURCES.validate_python(content["sources"]))

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON values."""
        return {
            "modalities": _MODALITIES.dump_python(self.modalities, mode="json"),
            "sources": _SOURCES.dump_python(self.sources, mode="json"),
        }

    def differences(self, other: "RunData") -> list[str]:
        """Return how this data differs from an ``other``, in words. Empty: it is the same."""
        return list(dict.fromkeys([*self._other_sources(other), *self._other_statistics(other)]))

    def _other_sources(self, other: "RunData") -> Iterator[str]:
        for mine, theirs in zip(self.sources, other.sources, strict=False):
            if mine.file != theirs.file:
                yield f"the source is {mine.file}, and was {theirs.file}"
            elif mine.sha256 != theirs.sha256:
                yield f"{mine.file} has sha256 {mine.sha256[:12]}, and had {theirs.sha256[:12]}"
            elif mine.rows != theirs.rows:
                yield f"{mine.file} has {mine.rows:,} rows of this split, and had {theirs.rows:,}"

    def _other_statistics(self, other: "RunData") -> Iterator[str]:
        for mine, theirs in zip(self.modalities, other.modalities, strict=False):
            fields, before = mine.model_dump(), theirs.model_dump()
            yield from (f"{mine.name} has a different {key}" for key in fields if fields[key] != before.get(key))


def keep_run_data(run: Run, data: RunData) -> None:
    """Record the data of a new run. Check that the data of an existing run is the same.

    Raises:
        RunError: the run was trained on other data, or its record is damaged.
    """
    file = run.path / FILE
    if file.exists():
        try:
            before = RunData.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file}: damaged ({type(error).__name__}). Name another folder with --out, or start over with --fresh"
            ) from error
        if differences := data.differences(before):
            raise RunError(
                f"{run.path}: holds a run with other data: {'; '.join(differences)}. Restore the data, name another folder "
                "with --out, or start over with --fresh"
            )
        if len(data.sources) > len(before.sources):
            run.write(FILE, data.to_json())
        return
    if run.has_checkpoint:
        _log.warning("%s: began before version 0.2, which records the data of a run. It is assumed to be unchanged", run.path)
    run.write(FILE, data.to_json())
