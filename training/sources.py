"""One source of rows, opened with the ``datasets`` library: its splits, its columns, its labels."""

import glob
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.dataset
import pyarrow.parquet
from jaxtyping import Int64
from numpy.typing import NDArray

from model.manifest import DataSource
from model.modality import Modality
from training.columns import UNKNOWN, Column, Rows, columns_of, decode
from training.config import Place, Source
from training.room import MOST_BYTES

__all__ = [
    "UNKNOWN",
    "Column",
    "DataError",
    "Rows",
    "Split",
    "Table",
    "judge",
    "names_of",
    "open_rows",
    "read_labels",
    "read_table",
]

Split = Literal["train", "test"]
Which = Literal["all", "complete"]
_SHOWN = 5  # bad values, in a message
_READ = 256  # rows of a Parquet file at a time, within a row group
_log = logging.getLogger(__name__)


class DataError(Exception):
    """Data that cannot be trained on. The message names the file, the row where there is one, and the remedy."""


@dataclass(frozen=True)
class Table:
    """The decoded rows of one source."""

    columns: Mapping[str, Column]
    """By modality."""
    labels: Int64[np.ndarray, " row"] | None
    """Class numbers, ``UNKNOWN`` where the column holds none. None: the source names no label column."""
    class_names: tuple[str, ...] | None
    facts: DataSource
    left_out: Int64[np.ndarray, " empty"]
    """The file's rows that hold no modality at all."""

    def __len__(self) -> int:
        return self.facts.rows


def read_table(
    source: Source,
    split: Split,
    modalities: Mapping[str, Modality],
    folder: Path,
    class_names: tuple[str, ...] | None = None,
    bad_values: Literal["fail", "absent"] = "fail",
    which: Which = "all",
    most_bytes: int = MOST_BYTES,
) -> Table:
    """Read one split of a source and decode every row.

    Args:
        modalities: by name, at least those of ``source.columns``.
        folder: where paths start.
        class_names: stand for the names that the label column gives.
        bad_values: what to do of values that cannot be read, and of rows that then have nothing. ``absent`` warns of both.
        which: of the training rows.
        most_bytes: that one modality's values may take in memory, see ``room``.

    Raises:
        DataError: the source is missing, empty or damaged, lacks a column, has labels that are no classes, a value that is
            none of its modality, or a row with no modality at all.
    """
    rows = open_rows(source, split, folder, which)
    labels, names = read_labels(rows, source.label, class_names) if source.label else (None, None)
    decoded = {}
    for name, columns in source.columns.items():
        own = names if columns == source.label else names_of(rows, columns)
        most = _SHOWN if bad_values == "fail" else None
        decoded[name] = decode(rows, columns_of(columns), modalities[name], own, most, most_bytes)
        judge(rows, name, columns, decoded[name], bad_values)
    present = np.array([column.present for column in decoded.values()])
    filled = present.any(axis=0)
    if not filled.all():
        empty = rows.numbers[~filled]
        told = f"{rows.file}: {empty.size} rows hold no modality at all, the first are {empty[:5].tolist()}"
        if bad_values == "fail":
            raise DataError(f'{told}. Remove them, or say bad_values = "absent" under [data]')
        _log.warning("%s: they are left out", told)
    wanted = present.all(axis=0) if which == "complete" and split == "train" else filled
    kept = None if wanted.all() else np.flatnonzero(wanted)
    digest = _sha256(source, split, folder, [part for c in decoded.values() for part in (c.values, c.present)])
    facts = DataSource(file=rows.file, sha256=digest, rows=int(wanted.sum()), licence=source.licence)
    return Table(
        decoded if kept is None else {name: column.take(kept, most_bytes) for name, column in decoded.items()},
        labels if labels is None or kept is None else labels[kept],
        names,
        facts,
        rows.numbers[~filled],
    )


def open_rows(source: Source, split: Split, folder: Path, which: Which = "all") -> Rows:
    """The rows of one split, with the columns that the source names; ``complete``: of the training rows those without a null.

    Raises:
        DataError: see ``read_table``.
    """
    place = source.train if split == "train" or source.test is None else source.test
    file = _title(place)
    table = open_place(place, folder)
    columns = [column for named in source.columns.values() for column in columns_of(named)]
    wanted = [*columns, *(column for column in (source.label, source.split) if column)]
    if lacking := sorted(set(wanted) - set(table.column_names)):
        raise DataError(f"{file}: no column {lacking}. Its columns are {table.column_names}")
    numbers = np.arange(len(table))
    if source.split:
        told = np.array(table.select_columns([source.split]).with_format("arrow")[:].column(source.split).to_pylist(), object)
        numbers = np.flatnonzero(told == split)
        if split == "train" and (others := sorted({str(value) for value in told} - {"train", "test"})):
            count = len(table) - int(np.isin(told, ["train", "test"]).sum())
            _log.warning("%s: %d rows are of neither split: column %r says %s of them", file, count, source.split, others[:5])
        if not len(numbers):
            raise DataError(f"{file}: no row is of split {split!r}: column {source.split!r} must say train or test of each row")
    elif source.held_out:
        order = np.random.default_rng(0).permutation(len(table))
        tested = max(1, round(source.held_out * len(table)))
        numbers = np.sort(order[:tested] if split == "test" else order[tested:])
        if not len(numbers):
            raise DataError(f"{file}: has {len(table)} rows, too few to hold some out. Name a file under test instead")
    if which == "complete" and split == "train":
        arrow = table.select_columns(columns).with_format("arrow")[:]
        complete = np.all([arrow.column(column).is_valid().to_numpy() for column in columns], axis=0)
        before, numbers = len(numbers), numbers[complete[numbers]]
        _log.info("%s: %d of %d training rows lack nothing, and are trained on", file, len(numbers), before)
        if not len(numbers):
            raise DataError(f'{file}: every training row lacks something: say rows = "all" under [data]')
    return Rows(file, table if len(numbers) == len(table) else table.select(numbers), numbers)


def names_of(rows: Rows, columns: str | tuple[str, ...]) -> tuple[str, ...] | None:
    """Names of the classes, where the column holds class numbers."""
    feature = rows.table.features[columns_of(columns)[0]]
    return read_labels(rows, columns_of(columns)[0], None)[1] if isinstance(feature, datasets.ClassLabel) else None


def judge(rows: Rows, name: str, columns: str | tuple[str, ...], column: Column, bad_values: Literal["fail", "absent"]) -> None:
    """Warn of what counts as absent and was there.

    Raises:
        DataError: values that cannot be read, unless ``bad_values`` is ``absent``.
    """
    told = ", ".join(map(repr, columns_of(columns)))
    if column.blank:
        _log.warning("%s: column %s is blank in %d rows: they count as absent", rows.file, told, column.blank)
    if not column.faults:
        return
    shown = "; ".join(f"row {row}: column {told} holds no {name}: {reason}" for row, reason in column.faults[:_SHOWN])
    if bad_values == "fail":
        remedy = 'Repair or remove the row, or say bad_values = "absent" under [data]; null marks an absent modality'
        raise DataError(f"{rows.file}: {shown}. {remedy}")
    _log.warning("%s: %d values count as absent: %s", rows.file, len(column.faults), shown)


def _title(place: Place) -> str:
    if isinstance(place, str):
        return place
    return ":".join(part for part in (place.hub, place.config, place.split, place.revision) if part)


def open_place(place: Place, folder: Path) -> datasets.Dataset:
    """All rows of a place.

    Raises:
        DataError: it cannot be opened.
    """
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # the library reports home even when it opens a local file
    if isinstance(place, str):
        path = folder / place
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder. Name the data folder with --data, CONCORD_DATA or folder under [data]"
            )
        if path.is_dir():
            files = {"rows": f"{glob.escape(str(path))}/**"}
            arguments: dict[str, Any] = {"path": "imagefolder", "data_files": files, "drop_labels": False, "split": "rows"}
        elif path.suffix == ".parquet":
            _refuse_columns(path)
            arguments = {"path": "parquet", "data_files": {"rows": glob.escape(str(path))}, "split": "rows"}
            # Else the whole file is read ahead, however large it is.
            arguments["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
            arguments["batch_size"] = _READ
        else:
            raise DataError(f"{path}: a source is a .parquet file or a folder with one folder of images a class")
        remedy = "Check that it is whole, of this format and not empty"
    else:
        arguments = {"path": place.hub, "name": place.config, "split": place.split, "revision": place.revision}
        remedy = "Check the name and the connection to the hub, or save it as Parquet and name the file"
    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # file systems, Arrow and the hub's client raise their own classes
        cause = error.__cause__ or error
        raise DataError(f"{_title(place)}: cannot be opened ({type(cause).__name__}: {cause}). {remedy}") from error


def _refuse_columns(path: Path) -> None:
    try:
        schema = pyarrow.parquet.read_schema(path)
    except Exception:  # told in a moment, when the file is opened
        return
    names = schema.names
    for part in schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([part]))
        except ValueError as error:
            raise DataError(f"{path}: column {part.name!r} holds {part.type}, which cannot be read. Remove it") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: several columns are named {twice}. Rename all but one of each")


def read_labels(
    rows: Rows, column: str, class_names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Class numbers, ``UNKNOWN`` where nobody told, and the classes' names.

    A column of strings takes its numbers from ``class_names``, else from its own strings in alphabetical order.

    Raises:
        DataError: no labels, or numbers that are no class.
    """
    feature, file = rows.table.features[column], rows.file
    dtype = str(getattr(feature, "dtype", ""))
    if isinstance(feature, datasets.Value) and dtype in ("string", "large_string"):
        told = [value.strip() if value and value.strip() else None for value in rows.values([column])]
        names = class_names or tuple(sorted({name for name in told if name is not None}))
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([UNKNOWN if name is None else numbers.get(name, UNKNOWN) for name in told]), names
    if not (isinstance(feature, datasets.ClassLabel) or dtype.startswith(("int", "uint"))):
        raise DataError(
            f"{file}: the label column {column!r} holds {feature}. Labels are a ClassLabel, strings or whole numbers"
        )
    selected = rows.table.select_columns([column]).with_format("arrow")[:].column(column)
    labels = selected.fill_null(UNKNOWN).to_numpy().astype(np.int64)
    own = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if class_names is not None and own is not None and len(own) != len(class_names):
        raise DataError(f"{file}: {column!r} has {len(own)} classes, data.class_names names {len(class_names)}")
    names = class_names or own or ()
    wrong = np.flatnonzero((labels < UNKNOWN) | (labels >= (len(names) if names else np.inf)))
    if wrong.size:
        allowed = f"0 to {len(names) - 1}" if names else "0 and above"
        raise DataError(
            f"{file}: row {rows.numbers[wrong[0]]}, label {labels[wrong[0]]}: class numbers are {allowed}, {UNKNOWN} or null "
            "where unknown"
        )
    return labels, names or None


def _sha256(source: Source, split: Split, folder: Path, content: list[NDArray[Any]]) -> str:
    """Of the file; of the decoded arrays where the source is no single file."""
    place = source.train if split == "train" or source.test is None else source.test
    if isinstance(place, str) and (folder / place).is_file():
        with (folder / place).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for array in content:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
