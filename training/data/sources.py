"""One source of rows: splits, columns and labels."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy.typing import NDArray

from concord.model.bundle.manifest import DataSource
from concord.model.codec.columns import plain_type
from concord.model.modality import CategoricalModality, Modality
from concord.training.config import Hub, Place, Source
from concord.training.data.cache import cached
from concord.training.data.columns import UNKNOWN, Column, Rows, column_names, parse_column
from concord.training.data.memmap import MAX_BYTES
from concord.training.data.tables import (
    PARQUET_SUFFIXES,
    HubTable,
    ParquetTable,
    RawTable,
    RemoteParquetTable,
    cannot_open,
    open_folder,
)
from concord.training.encoders.features import StoredFeatures
from concord.training.errors import DataError

__all__ = [
    "TEST_NAMES",
    "TRAIN_NAME",
    "UNKNOWN",
    "Column",
    "Rows",
    "Shard",
    "Split",
    "Table",
    "open_rows",
    "read_class_names",
    "read_labels",
    "read_table",
    "validate_column",
]

Split = Literal["train", "test"]
TRAIN_NAME = "train"
TEST_NAMES = ("test", "validation", "valid", "val", "dev")
"""Values of a ``split`` column that mean test rows. Only the first of them that occurs does."""
RowSelection = Literal["all", "complete"]
Encoders = Mapping[str, StoredFeatures]
_MAX_SHOWN = 5
"""Errors quoted in a message."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """The part of a Parquet file's rows that one of several processes reads: every ``size``-th row group."""

    rank: int
    size: int
    sha256: str | None
    """Hash of the file."""

    def __str__(self) -> str:
        return f"the shard of process {self.rank} of {self.size}"

    def groups(self, table: RawTable) -> tuple[int, ...]:
        """Return the indices of the row groups.

        Raises:
            DataError: the table has no row groups, or fewer than there are processes.
        """
        count = len(table.group_rows) if isinstance(table, ParquetTable) else 0
        if count < self.size:
            raise DataError(
                f"{table.name}: has {count} row groups, and {self.size} processes need one each. Write a Parquet file with "
                "smaller row groups (row_group_size in pandas and pyarrow), or set shards = false under [data]"
            )
        return tuple(range(self.rank, count, self.size))


@dataclass(frozen=True)
class Table:
    """The parsed rows of one source."""

    columns: Mapping[str, Column]
    """By modality."""
    labels: Int64[np.ndarray, " row"] | None
    """Class numbers, ``UNKNOWN`` where the label is missing. None: the source has no label column."""
    class_names: tuple[str, ...] | None
    source: DataSource
    """File, hash, row count and licence."""
    empty_rows: Int64[np.ndarray, " empty"]
    """Row numbers of the file that have no modality. They are not in the table."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the source was read."""
    read_as: Callable[[str, Int64[np.ndarray, " chosen"], Modality], Column] | None = None
    """(modality, indices of rows in ascending order, how to parse it) -> the values of these rows, read from the file again."""

    def __len__(self) -> int:
        return self.source.rows


def read_table(
    source: Source,
    split: Split,
    modalities: Mapping[str, Modality],
    folder: Path,
    class_names: tuple[str, ...] | None = None,
    bad_values: Literal["fail", "absent"] = "fail",
    selection: RowSelection = "all",
    max_bytes: int = MAX_BYTES,
    cache: Path | None = None,
    encoders: Encoders = MappingProxyType({}),
    shard: Shard | None = None,
) -> Table:
    """Read one split of a source and parse every row.

    Args:
        modalities: by name, at least those of ``source.columns``.
        folder: base folder of relative paths.
        class_names: replace the names in the label column.
        bad_values: how to treat values that cannot be parsed, and rows without any modality. ``fail`` raises. ``absent`` treats
            the values as absent, drops the rows, and logs a warning for both.
        selection: which training rows to use. ``complete``: rows that have all modalities.
        max_bytes: memory limit of one modality's values, see ``allocate``.
        cache: folder of parsed columns, see ``cache.cached``. None: nothing is kept.
        encoders: features of the modalities with a frozen encoder, by modality.
        shard: the part of the training rows to read. None: all.

    Raises:
        DataError: the source is missing, empty or damaged, lacks a column, or has an invalid label. With ``bad_values="fail"``
            also an invalid value or a row without any modality.
    """
    rows = open_rows(source, split, folder, selection, encoders, shard)
    digest = shard.sha256 if shard else (rows.table.sha256() if cache else None)
    labels, label_names = read_labels(rows, source.label, class_names) if source.label else (None, None)
    parsed = {}
    for name, columns in source.columns.items():
        names = label_names if columns == source.label else read_class_names(rows, columns)
        max_errors = _MAX_SHOWN if bad_values == "fail" else None
        key = (rows, column_names(columns), modalities[name], names)
        parse = partial(parse_column, *key, max_errors, max_bytes, is_test=split == "test")
        parsed[name] = cached(cache, digest, *key, parse, is_test=split == "test")
        validate_column(rows, name, columns, parsed[name], bad_values)
    present = np.array([column.present for column in parsed.values()])
    nonempty = present.any(axis=0)
    if not nonempty.all():
        empty = rows.numbers[~nonempty]
        message = f"{rows.file}: {empty.size} rows have no modality, the first are {empty[:5].tolist()}"
        if bad_values == "fail":
            raise DataError(f'{message}. Remove them, or set bad_values = "absent" under [data]')
        _log.warning("%s: these rows are dropped", message)
    selected = present.all(axis=0) if selection == "complete" and split == "train" else nonempty
    kept = None if selected.all() else np.flatnonzero(selected)
    digest = (
        digest
        or (None if shard else rows.table.sha256())
        or _sha256([part for column in parsed.values() for part in (column.values, column.present)])
    )
    numbers = rows.numbers if kept is None else rows.numbers[kept]

    def read_as(name: str, chosen: Int64[np.ndarray, " chosen"], modality: Modality) -> Column:
        return parse_column(replace(rows, numbers=numbers[chosen]), column_names(source.columns[name]), modality, None)

    notes = [*rows.table.notes, *(note for column in parsed.values() for note in column.notes)]
    if split == "train" and not shard:  # other shards may have the classes
        notes += _untrained_classes(parsed, modalities, {name: read_class_names(rows, c) for name, c in source.columns.items()})
    for note in notes if split == "train" else ():
        _log.info("%s", note)
    return Table(
        parsed if kept is None else {name: column.take(kept, max_bytes) for name, column in parsed.items()},
        labels if labels is None or kept is None else labels[kept],
        label_names,
        DataSource(file=rows.file, sha256=digest, rows=int(selected.sum()), licence=source.licence),
        rows.numbers[~nonempty],
        tuple(notes),
        read_as,
    )


def _untrained_classes(
    columns: Mapping[str, Column], modalities: Mapping[str, Modality], class_names: Mapping[str, tuple[str, ...] | None]
) -> list[str]:
    """Return a note for each modality whose column or configuration names classes that no row has."""
    notes = []
    for name, column in columns.items():
        modality = modalities[name]
        if isinstance(modality, CategoricalModality):
            named = dict.fromkeys((*modality.classes, *(class_names[name] or ())))
            found = {modality.classes[number] for number in np.unique(column.values[column.present]).tolist()}
            missing = [class_name for class_name in named if class_name not in found]
            if missing:
                shown = ", ".join(missing[:_MAX_SHOWN])
                more = f" and {len(missing) - _MAX_SHOWN} more" if missing[_MAX_SHOWN:] else ""
                notes.append(f"{name}: {len(missing)} of its {len(named)} classes are in no training row: {shown}{more}")
    return notes


def open_rows(
    source: Source,
    split: Split,
    folder: Path,
    selection: RowSelection = "all",
    encoders: Encoders = MappingProxyType({}),
    shard: Shard | None = None,
) -> Rows:
    """Return the rows of one split.

    Args:
        encoders: as in ``read_table``.
        selection: ``complete``: drop training rows with a null in one of the source's columns.
        shard: the part of the rows to return. None: all.

    Raises:
        DataError: see ``read_table``.
    """
    table = open_table(source.train if split == "train" or source.test is None else source.test, folder)
    file = table.name
    columns = [column for named in source.columns.values() for column in column_names(named)]
    required = [*columns, *(column for column in (source.label, source.split, *source.where) if column)]
    if missing := sorted(set(required) - set(table.column_names)):
        raise DataError(f"{file}: no column {missing}. Its columns are {table.column_names}")
    numbers = _chosen(table, source.where)
    if source.split:
        splits = np.array(list(_names(table, source.split)), object)
        found = set(splits)
        names = {TRAIN_NAME, next((name for name in TEST_NAMES if name in found), TEST_NAMES[0])}
        numbers = numbers[np.isin(splits[numbers], [TRAIN_NAME] if split == "train" else sorted(names - {TRAIN_NAME}))]
        if split == "train" and (others := sorted({str(value) for value in found - names})):
            count = len(table) - int(np.isin(splits, sorted(names)).sum())
            _log.warning("%s: %d rows are in neither split: column %r has the values %s", file, count, source.split, others[:5])
        if not len(numbers):
            allowed = f"{TRAIN_NAME}, or {' or '.join(TEST_NAMES)}"
            raise DataError(f"{file}: split {split!r} has no rows. Column {source.split!r} must hold {allowed} in each row")
    elif source.held_out:
        order = np.random.default_rng(0).permutation(numbers)
        test_rows = max(1, round(source.held_out * len(numbers)))
        numbers = np.sort(order[:test_rows] if split == "test" else order[test_rows:])
        if not len(numbers):
            raise DataError(f"{file}: {len(table)} rows are too few for held_out. Name a file of test rows under test instead")
    groups = shard.groups(table) if shard else None
    if groups is not None:
        assert isinstance(table, ParquetTable)
        own = [np.array(table.group_rows[group]) for group in groups]
        numbers = np.intersect1d(numbers, np.concatenate(own), assume_unique=True)
        if not len(numbers):
            raise DataError(f"{file}: {shard} has no training row. Start fewer processes, or set shards = false under [data]")
    if selection == "complete" and split == "train":
        complete = np.concatenate(
            [complete_rows(arrays) for arrays in Rows(table, numbers, folder, groups=groups).batches(columns)]
        )
        before, numbers = len(numbers), numbers[complete]
        _log.info("%s: %d of %d training rows are complete and used", file, len(numbers), before)
        if not len(numbers):
            raise DataError(f'{file}: no training row is complete. Set rows = "all" under [data]')
    return Rows(table, numbers, folder, encoders, groups)


def complete_rows(columns: Sequence[pa.Array]) -> NDArray[np.bool_]:
    """Return which rows have no null."""
    valid: NDArray[np.bool_] = np.all([column.is_valid().to_numpy(zero_copy_only=False) for column in columns], axis=0)
    return valid


def _chosen(table: RawTable, where: Mapping[str, str]) -> NDArray[np.int64]:
    """Return the numbers of the rows that hold the given value in each of the given columns.

    Raises:
        DataError: there are none.
    """
    numbers = np.arange(len(table))
    for column, value in where.items():
        values = np.array(list(_names(table, column)), object)
        if not (values[numbers] == value).any():
            found = sorted({str(one) for one in values if one is not None})[:_MAX_SHOWN]
            raise DataError(f"{table.name}: no row has {value!r} in column {column!r}; it holds {', '.join(found)}")
        numbers = numbers[values[numbers] == value]
    return numbers


def _names(table: RawTable, column: str) -> Iterator[object]:
    """Iterate over the strings of a column, or over the names of its class numbers."""
    names = table.class_names(column)
    for batch in table.batches([column]):
        for value in batch.column(0).to_pylist():
            yield names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def read_class_names(rows: Rows, columns: str | tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel column; None for other columns."""
    return rows.table.class_names(column_names(columns)[0])


def validate_column(
    rows: Rows, name: str, columns: str | tuple[str, ...], column: Column, bad_values: Literal["fail", "absent"]
) -> None:
    """Log a warning for values that are present in the file but treated as absent.

    Raises:
        DataError: a value cannot be parsed, and ``bad_values`` is ``fail``.
    """
    names = ", ".join(map(repr, column_names(columns)))
    if column.blank:
        _log.warning("%s: column %s is blank in %d rows, which are treated as absent", rows.file, names, column.blank)
    if not column.errors:
        return
    shown = "; ".join(f"row {row}, column {names}: invalid {name}: {reason}" for row, reason in column.errors[:_MAX_SHOWN])
    if bad_values == "fail":
        remedy = 'Repair or remove the row, or set bad_values = "absent" under [data]; null marks an absent modality'
        raise DataError(f"{rows.file}: {shown}. {remedy}")
    _log.warning("%s: %d values are treated as absent: %s", rows.file, len(column.errors), shown)


def _display_name(place: Place) -> str:
    if isinstance(place, str):
        return re.sub(r"(?<=://)[^/@]*@|\?.*", "", place) if "://" in place else place  # without credentials
    return ":".join(part for part in (place.hub, place.config, place.split, place.revision) if part)


def open_table(place: Place, folder: Path) -> RawTable:
    """Open all rows of a Parquet file, a folder of images, or a data set on the Hugging Face hub.

    Args:
        folder: base folder of relative paths.

    Raises:
        DataError: the rows cannot be opened.
    """
    name = _display_name(place)
    if not isinstance(place, str):
        return HubTable(_load_from_hub(place, name), name)
    if "://" in place:
        return RemoteParquetTable(place, name, folder)
    path = folder / place
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Set the data folder with --data, CONCORD_DATA or folder under [data]")
    if path.is_dir():
        return open_folder(path, name)
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return ParquetTable(path, name)
    raise DataError(
        f"{path}: a source must be a file that ends in {' or '.join(PARQUET_SUFFIXES)}, or a folder with one folder of images "
        "per class"
    )


def _load_from_hub(place: Hub, name: str) -> Any:
    import datasets  # noqa: PLC0415 - takes seconds and memory that other sources do without

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return datasets.load_dataset(place.hub, name=place.config, split=place.split, revision=place.revision)
    except Exception as error:  # file systems, Arrow and the hub's client raise unrelated classes
        remedy = "Check the name and the connection to the hub, or save the rows as Parquet and name the file"
        raise cannot_open(name, error.__cause__ or error, remedy) from error


def has_strings(table: RawTable, column: str) -> bool:
    """Return whether a column holds strings, of any type or in a dictionary."""
    return str(plain_type(table.schema.field(column).type)).endswith("string")


def read_labels(
    rows: Rows, column: str, class_names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Return the class numbers, ``UNKNOWN`` where the label is missing, and the class names if there are any.

    A column of strings is numbered by ``class_names``, or else by its distinct strings in alphabetical order. Whole numbers may
    be of a floating-point type: integers with a gap become floats in many tools.

    Raises:
        DataError: the column holds no labels, or a number that is not a class number.
    """
    arrays, file = [array for (array,) in rows.batches([column])], rows.file
    if has_strings(rows.table, column):
        strings = [value.strip() if value and value.strip() else None for array in arrays for value in array.to_pylist()]
        names = class_names or tuple(sorted({name for name in strings if name is not None}))
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([UNKNOWN if name is None else numbers.get(name, UNKNOWN) for name in strings]), names
    if not (pa.types.is_integer(arrays[0].type) or pa.types.is_floating(arrays[0].type)):
        raise DataError(
            f"{file}: the label column {column!r} has the type {arrays[0].type}. Labels must be a ClassLabel, strings or whole "
            "numbers"
        )
    values = np.concatenate([array.cast("float64", safe=False).to_numpy(zero_copy_only=False) for array in arrays])
    values[np.isnan(values)] = UNKNOWN
    column_classes = rows.table.class_names(column)
    if class_names is not None and column_classes is not None and len(column_classes) != len(class_names):
        raise DataError(f"{file}: {column!r} has {len(column_classes)} classes, data.class_names names {len(class_names)}")
    names = class_names or column_classes or ()
    invalid = np.flatnonzero((values < UNKNOWN) | (values >= (len(names) if names else 2**53)) | (values != np.rint(values)))
    if invalid.size:
        allowed = f"0 to {len(names) - 1}" if names else "whole numbers, 0 and above"
        raise DataError(
            f"{file}: row {rows.numbers[invalid[0]]}, label {values[invalid[0]]:.15g}: class numbers are {allowed}, "
            f"and {UNKNOWN} or null where unknown"
        )
    return values.astype(np.int64), names or None


def _sha256(content: list[NDArray[Any]]) -> str:
    """Return the hash of parsed arrays."""
    digest = hashlib.sha256()
    for array in content:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
