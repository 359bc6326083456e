"""Table columns parsed into the arrays of a modality, with the reader that bulk jobs use. Errors name the row."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from concord.model.codec.columns import UNKNOWN_CLASS, Cell, ColumnReader, read_from, white_level
from concord.model.modality import ImageModality, Modality, is_picture, is_text
from concord.training.data.memmap import MAX_BYTES, allocate, copy_rows
from concord.training.data.tables import ParquetTable, RawTable
from concord.training.encoders.features import StoredFeatures

UNKNOWN = UNKNOWN_CLASS
"""Label of a row whose class is unknown."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of one split of one table.

    Attributes:
        table: all rows of the file.
        numbers: row numbers in the file, from 0, in ascending order.
        folder: relative paths of pictures start here, or at the table's folder.
        encoders: features of the modalities with a frozen encoder, by modality.
        groups: row groups that hold the rows. No other one is read. None: all.
    """

    table: RawTable
    numbers: Int64[np.ndarray, " row"]
    folder: Path
    encoders: Mapping[str, StoredFeatures] = field(default_factory=dict)
    groups: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def file(self) -> str:
        """Display name of the file."""
        return self.table.name

    def batches(self, columns: Sequence[str]) -> Iterator[list[pa.Array]]:
        """Iterate over the rows of some columns in batches: one array for each column."""
        distinct = list(dict.fromkeys(columns))
        for start, batch in self._parts(distinct):
            first, last = np.searchsorted(self.numbers, (start, start + batch.num_rows))
            chosen = self.numbers[first:last] - start
            if len(chosen) and len(chosen) < batch.num_rows:
                batch = batch.take(pa.array(chosen))  # noqa: PLW2901
            if len(chosen):
                yield [batch.column(distinct.index(column)) for column in columns]

    def _parts(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Iterate over the batches of the file, each with the number of its first row."""
        if self.groups is None:
            parts = [(0, self.table.batches(columns))]
        else:
            assert isinstance(self.table, ParquetTable)
            bounds = self.table.group_rows
            parts = [(bounds[group].start, self.table.batches(columns, [group])) for group in self.groups]
        for start, batches in parts:
            first = start
            for batch in batches:
                yield first, batch
                first += batch.num_rows

    def reader(self, columns: Sequence[str], modality: Modality, class_names: tuple[str, ...] | None) -> ColumnReader:
        """Return the reader of a modality's columns.

        Args:
            class_names: names of the classes if the column holds class numbers.
        """
        white = 1.0
        if is_picture(modality) and self.has_lists(columns[0]):
            white = white_level(self.table.value_range(columns[0]))
        read_file = read_from(self.folder, self.table.folder)
        features = self.encoders.get(modality.name)
        return ColumnReader(modality, tuple(columns), class_names, white, read_file, preprocessor=features)

    def compute_features(self, columns: Sequence[str], modality: Modality, class_names: tuple[str, ...] | None) -> None:
        """Compute the features of a modality with a frozen encoder that are not stored yet. Nothing if it has no encoder."""
        features = self.encoders.get(modality.name)
        if features is None:
            return
        with features.computing():
            for _ in _track(_cells(self, self.reader(columns, modality, class_names)), self, columns):
                pass

    def has_lists(self, column: str) -> bool:
        """Whether a column holds lists."""
        return hasattr(self.table.schema.field(column).type, "value_field")


@dataclass
class Column:
    """The parsed values of one modality.

    Attributes:
        values: image files as uint8 in [0, 255], everything else in the modality's dtype. Zeros where absent.
        present: which rows have a value.
        starts: set when a row may have more than one text: row r has ``values[starts[r]:starts[r + 1]]``. A row without a text
            has one entry of zeros.
        errors: row number in the file and reason of each value that cannot be parsed; at most ``max_errors`` of them.
        blank: number of rows with an empty text. They count as absent.
        unseen: number of rows by class, of classes that no training row has. They count as absent.
        notes: how the values were read, where the file leaves that open.
    """

    values: Shaped[np.ndarray, "value ..."]
    present: Bool[np.ndarray, " row"]
    starts: Int64[np.ndarray, " boundary"] | None = None
    errors: list[tuple[int, str]] = field(default_factory=list)
    blank: int = 0
    unseen: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()

    def take(self, rows: NDArray[np.int64], max_bytes: int = MAX_BYTES) -> "Column":
        """Return the given rows in the given order. ``max_bytes``: see ``allocate``."""
        if self.starts is None:
            return replace(self, values=copy_rows(self.values, rows, max_bytes), present=self.present[rows])
        chosen = np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in rows])
        starts = np.concatenate([[0], np.cumsum(np.diff(self.starts)[rows])])
        return replace(self, values=copy_rows(self.values, chosen, max_bytes), present=self.present[rows], starts=starts)


def column_names(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a modality's columns as a tuple."""
    return (columns,) if isinstance(columns, str) else columns


def parse_column(
    rows: Rows,
    columns: Sequence[str],
    modality: Modality,
    class_names: tuple[str, ...] | None,
    max_errors: int | None = None,
    max_bytes: int = MAX_BYTES,
    *,
    is_test: bool = False,
) -> Column:
    """Parse one modality of every row.

    Args:
        columns: one column, or multiple columns of single numbers.
        class_names: names of the classes if the column holds class numbers.
        max_errors: stop after this number of errors. None: parse all rows.
        max_bytes: memory limit of the values, see ``allocate``.
        is_test: classes that the modality does not have count as absent, and are no errors.
    """
    is_image_file = isinstance(modality, ImageModality) and modality.in_files
    has_texts = is_text(modality) and rows.has_lists(columns[0])
    rows.compute_features(columns, modality, class_names)
    column = Column(
        allocate((len(rows), *modality.shape), np.uint8 if is_image_file else modality.dtype, max_bytes),
        np.zeros(len(rows), dtype=bool),
    )
    starts = [0]
    start_time = time.monotonic()
    reader = rows.reader(columns, modality, class_names)
    for row, cell in enumerate(_track(_cells(rows, reader), rows, columns)):
        values = cell.values
        column.blank += cell.blank
        if cell.error is not None and is_test and (name := cell.unknown_class) is not None:
            column.unseen[name] += 1
        elif cell.error is not None:
            column.errors.append((int(rows.numbers[row]), str(cell.error)))
            if len(column.errors) == max_errors:
                break
        if has_texts:
            starts.append(starts[-1] + max(1, len(values)))
            column.values = _grow(column.values, starts[-1], max_bytes)
            if values:
                column.values[starts[-2] : starts[-1]] = values
        elif values:
            column.values[row] = np.rint(values[0] * 255) if is_image_file else values[0]
        column.present[row] = bool(values)
    if has_texts:
        column.values = column.values[: starts[-1]]
        column.starts = np.array(starts)
    column.notes = _layout_notes(rows, reader)
    _log.info("read %d rows of %s %s in %.1f s", len(rows), rows.file, " ".join(columns), time.monotonic() - start_time)
    return column


def describe_absence(
    rows: Rows, columns: Sequence[str], modality: Modality, class_names: tuple[str, ...] | None, limit: int = 3
) -> str:
    """Return why rows lack a modality, in words: how many are null or blank, and the first values that cannot be parsed."""
    nulls, blank, errors = 0, 0, list[tuple[int, str]]()
    for row, cell in enumerate(_cells(rows, rows.reader(columns, modality, class_names))):
        blank += cell.blank
        nulls += not (cell.values or cell.blank or cell.error)
        if cell.error is not None and cell.unknown_class is None:
            errors.append((int(rows.numbers[row]), str(cell.error)))
    return absence(nulls, blank, errors[:limit], len(errors))


def absence(nulls: int, blank: int, first: Sequence[tuple[int, str]], errors: int) -> str:
    """Return numbers of absent values and the first errors in words.

    Args:
        first: row numbers and reasons of the first errors.
        errors: number of all errors.
    """
    counts = [(nulls, "null"), (blank, "blank"), (errors, "not readable")]
    summary = ", ".join(f"{count:,} {name}" for count, name in counts if count)
    reasons = "".join(f"; row {row}: {reason}" for row, reason in first)
    return f"values: {summary or 'none'}{reasons}"


def read_names(
    rows: Rows, columns: Sequence[str], modality: Modality, class_names: tuple[str, ...] | None
) -> Iterator[list[str]]:
    """Iterate over the texts or class names of each row; an empty list where a row has none.

    Values of other types are skipped: ``parse_column`` reports them.
    """
    reader = rows.reader(columns, modality, class_names)
    for arrays in rows.batches(columns):
        yield from reader.names(arrays)


def _cells(rows: Rows, reader: ColumnReader) -> Iterator[Cell]:
    for arrays in rows.batches(reader.columns):
        yield from reader.cells(arrays)


def _track(cells: Iterator[Cell], rows: Rows, columns: Sequence[str]) -> Iterator[Cell]:
    """Show a progress bar at a terminal."""
    if not sys.stderr.isatty():
        return cells
    return iter(track(cells, f"{rows.file} {' '.join(columns)}", len(rows), console=Console(stderr=True)))


def _layout_notes(rows: Rows, reader: ColumnReader) -> tuple[str, ...]:
    """Return how pictures in nested lists were read."""
    if is_picture(reader.modality) and rows.has_lists(reader.columns[0]):
        for arrays in rows.batches(reader.columns):
            if (description := reader.described(arrays)) is not None:
                return (f"{reader.modality.name}: {description}",)
    return ()


def _grow(values: NDArray[Any], size: int, max_bytes: int) -> NDArray[Any]:
    """Return an array with the same values and space for at least ``size``. Doubles the length when it is too small."""
    if size <= len(values):
        return values
    larger = allocate((max(size, 2 * len(values)), *values.shape[1:]), values.dtype, max_bytes)
    larger[: len(values)] = values
    return larger
