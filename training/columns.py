"""Columns of a table -> arrays of a modality, through the codec that serving uses. What cannot be read is told by its row."""

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from model import codec
from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from training.room import MOST_BYTES, copy_rows, room

UNKNOWN = -1
"""Label of a row whose class nobody told."""
_CHUNK = 128
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of one split of one file.

    Attributes:
        file: its name, for readers.
        numbers: the rows' own numbers in the file, from 0.
    """

    file: str
    table: datasets.Dataset
    numbers: Int64[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.numbers)

    def values(self, columns: Sequence[str]) -> Iterator[Any]:
        """Of each row the value of a column, or a list of them where several columns are named; None where nothing is there."""
        for chunk in self.table.select_columns(list(columns)).with_format("arrow").iter(_CHUNK):
            lists = [[_present(value) for value in chunk.column(column).to_pylist()] for column in columns]
            if len(lists) == 1:
                yield from lists[0]
            else:
                yield from (None if all(v is None for v in row) else list(row) for row in zip(*lists, strict=True))


@dataclass
class Column:
    """The decoded values of one modality.

    Attributes:
        values: images as uint8 in [0, 255] where files hold them, others in the modality's dtype; zeros where absent.
        present: which rows have one.
        starts: where rows may have several texts: row r has values[starts[r]:starts[r + 1]], one of zeros where absent.
        faults: file row and reason of each value that cannot be read; at most ``most_faults``, if that was asked for.
        blank: rows whose text is empty, which counts as absent.
    """

    values: Shaped[np.ndarray, "value ..."]
    present: Bool[np.ndarray, " row"]
    starts: Int64[np.ndarray, " boundary"] | None = None
    faults: list[tuple[int, str]] = field(default_factory=list)
    blank: int = 0

    def take(self, rows: NDArray[np.int64], most_bytes: int = MOST_BYTES) -> "Column":
        """The same of some rows, in their order. ``most_bytes``: see ``room``."""
        if self.starts is None:
            return replace(self, values=copy_rows(self.values, rows, most_bytes), present=self.present[rows])
        chosen = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[rows])])
        return replace(self, values=copy_rows(self.values, chosen, most_bytes), present=self.present[rows], starts=starts)


def columns_of(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    """The columns that a modality is made of."""
    return (columns,) if isinstance(columns, str) else columns


def decode(
    rows: Rows,
    columns: Sequence[str],
    modality: Modality,
    names: tuple[str, ...] | None,
    most_faults: int | None = None,
    most_bytes: int = MOST_BYTES,
) -> Column:
    """Decode every row.

    Args:
        columns: one, or several of single numbers.
        names: of the classes, where the column holds class numbers.
        most_faults: reading ends with as many. None: all are found.
        most_bytes: that the values may take in memory, see ``room``.
    """
    several = isinstance(modality, TextModality) and isinstance(rows.table.features[columns[0]], datasets.List)
    stored = np.uint8 if isinstance(modality, ImageModality) and modality.in_files else modality.dtype
    column = Column(room((len(rows), *modality.shape), stored, most_bytes), np.zeros(len(rows), dtype=bool))
    starts = [0]
    read = _reader(modality, names, columns)
    began = time.monotonic()
    steps = track(
        rows.values(columns),
        f"{rows.file} {' '.join(columns)}",
        len(rows),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    for row, value in enumerate(steps):
        found: list[NDArray[Any]] = []
        try:
            if several:
                found = [read(text) for text in value or () if not _is_blank(text)]
                column.present[row] = bool(found)
            elif not (value is None or (names and value == UNKNOWN) or _is_blank(value)):
                column.values[row] = read(value)
                column.present[row] = True
            column.blank += value is not None and _is_blank(value)
        except (codec.CodecError, OSError) as error:
            column.faults.append((int(rows.numbers[row]), str(error)))
            if len(column.faults) == most_faults:
                break
        if several:
            starts.append(starts[-1] + max(1, len(found)))
            column.values = _grown(column.values, starts[-1], most_bytes)
            if found:
                column.values[starts[-2] : starts[-1]] = found
    if several:
        column.values = column.values[: starts[-1]]
        column.starts = np.array(starts)
    _log.info("read %d rows of %s %s in %.1f s", len(rows), rows.file, " ".join(columns), time.monotonic() - began)
    return column


def _grown(values: NDArray[Any], size: int, most_bytes: int) -> NDArray[Any]:
    """With room for at least ``size`` of them."""
    if size <= len(values):
        return values
    larger = room((max(size, 2 * len(values)), *values.shape[1:]), values.dtype, most_bytes)
    larger[: len(values)] = values
    return larger


def texts(rows: Rows, columns: Sequence[str], names: tuple[str, ...] | None) -> Iterator[list[str]]:
    """What each row has of a text or a class: nothing, one, or several. Values of other types are left to ``decode``."""
    for value in rows.values(columns):
        listed = value if isinstance(value, list) else [value]
        found = [_name(one, names) for one in listed if one is not None and not (names and one == UNKNOWN)]
        yield [one for one in found if isinstance(one, str) and one.strip()]


def _reader(modality: Modality, names: tuple[str, ...] | None, columns: Sequence[str]) -> Callable[[Any], NDArray[Any]]:
    if isinstance(modality, ImageModality) and modality.in_files:
        return lambda value: np.rint(codec.decode_bytes(modality, _image_bytes(value)) * 255)
    if isinstance(modality, ImageModality):
        return functools.partial(_picture, modality)
    if isinstance(modality, CategoricalModality) or (isinstance(modality, TextModality) and names):
        return lambda value: codec.decode(modality, _name(value, names))
    if isinstance(modality, TextModality):
        return functools.partial(codec.decode, modality)
    return lambda value: codec.decode(modality, _numbers(modality, value, columns))


def _name(value: object, names: tuple[str, ...] | None) -> object:
    if names and isinstance(value, int):
        return names[value]
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else value


def _numbers(modality: VectorModality | BinaryModality, value: object, columns: Sequence[str]) -> object:
    listed = value if isinstance(value, list) else [value]
    if len(columns) > 1 and None in listed:
        lacking = [name for name, number in zip(columns, listed, strict=True) if number is None]
        raise codec.CodecError("wrong_type", f"{', '.join(lacking)} missing while others of its columns are there")
    if isinstance(modality, VectorModality):
        return [int(number) if isinstance(number, bool) else number for number in listed]
    return [int(answer) if isinstance(answer, float) and answer in (0, 1) else answer for answer in listed]


def _picture(modality: ImageModality, value: object) -> NDArray[np.float32]:
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise codec.CodecError("wrong_type", f"a picture of {modality.channels} channels is nested lists of numbers") from error
    if array.shape != modality.shape:
        raise codec.CodecError("bad_image", f"the shape must be {list(modality.shape)}, received {list(array.shape)}")
    if not bool(np.all((array >= 0) & (array <= 1))):
        raise codec.CodecError("bad_image", "values must be finite and within [0, 1]")
    return array


def _image_bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, dict) and isinstance(value.get("path"), str):  # a folder of images
        return Path(value["path"]).read_bytes()
    raise codec.CodecError(
        "wrong_type", f"an image column holds image files as {{bytes, path}}, received {type(value).__name__}"
    )


def _present(value: object) -> object:
    """None where a cell holds NaN alone, which is how many tools write an empty one."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()
