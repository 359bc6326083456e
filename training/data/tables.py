"""Tables of rows, read in batches of bounded size: Parquet files, folders of pictures, data sets on the Hugging Face hub."""

import codecs
import hashlib
import io
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet

from concord.model.codec import columns as codec_columns
from concord.training.errors import DataError

PARQUET_SUFFIXES = (".parquet", ".pq")
"""In lower or upper case."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jfif")
"""Of files in a folder of pictures. Other formats than PNG, JPEG and WebP are rejected by the codec, with their names."""
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
"""Of audio files that a column names."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 4096
_BUFFER_BYTES = 64 << 10
"""Read from the file at once, for each column."""
_PATHS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Type of the pictures in a folder."""


class RawTable(ABC):
    """Rows with named columns.

    Attributes:
        name: for messages.
        schema: of all columns.
        folder: relative paths of pictures may start here, after the data folder.
        notes: what the user should know of the table.
    """

    name: str
    schema: pa.Schema
    folder: Path
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Iterate over all rows of some columns, without views and dictionaries.

        Raises:
            DataError: the rows cannot be read.
        """

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        return list(self.schema.names)

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the names of a ``ClassLabel`` column's class numbers. None: the column is of another type."""
        return codec_columns.class_names(self.schema.metadata, column)

    def value_range(self, column: str) -> tuple[float, float] | None:
        """Return the smallest and the largest number of a column of nested lists. None: it holds no number."""
        ranges = [found for batch in self.batches([column]) if (found := codec_columns.number_range(batch.column(0)))]
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

    def null_count(self, column: str) -> int | None:  # noqa: ARG002 - of other tables
        """Return the number of nulls in a column, if it is known without reading the column."""
        return None

    def sha256(self) -> str | None:
        """Return the hash of the file that holds the table. None: there is not exactly one file."""
        return None


class ParquetTable(RawTable):
    """A Parquet file. Nothing is cached: rows always are those of the file."""

    def __init__(self, path: Path, name: str) -> None:
        self.folder = path.parent
        self._path = path
        self._identity = _identity(path)
        # With pre_buffer or without a buffer size, Arrow would load the columns of a whole row group into memory.
        self._read_schema(name, lambda: pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES))

    def _read_schema(self, name: str, open_file: Callable[[], pyarrow.parquet.ParquetFile]) -> None:
        self.name = name
        try:
            self._file = open_file()
        except (OSError, pa.ArrowException) as error:
            raise cannot_open(name, error, "Check that it is complete and of this format") from error
        self.schema = self._file.schema_arrow
        if not len(self):
            raise DataError(f"{name}: cannot be opened (it has no data: no rows). Check that it is complete and not empty")
        if duplicates := sorted({column for column in self.column_names if self.column_names.count(column) > 1}):
            raise DataError(f"{name}: more than one column is named {duplicates}. Rename all but one of each")

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Iterate over the rows of some columns, of some row groups or (None) of all, see ``RawTable.batches``."""
        rows = 0
        size, names = self._batch_rows(columns), list(columns)
        try:
            for batch in self._file.iter_batches(size, row_groups=groups, columns=names, use_threads=False):
                arrays = [codec_columns.without_views(batch.column(column)) for column in columns]
                yield pa.RecordBatch.from_arrays(arrays, list(columns))
                rows += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.name}: columns {', '.join(columns)}: rows from {rows} on cannot be read "
                f"({type(error).__name__}: {error}). The file is damaged: write it again"
            ) from error
        finally:
            pa.default_memory_pool().release_unused()

    @property
    def group_rows(self) -> list[range]:
        """Row numbers of each row group."""
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.metadata.num_row_groups)]
        starts = itertools.accumulate(sizes, initial=0)
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]

    def value_range(self, column: str) -> tuple[float, float] | None:
        return codec_columns.stored_range(self._file, column) or super().value_range(column)

    def null_count(self, column: str) -> int | None:
        """Return the number of nulls from the file's statistics, if they state it."""
        counts = []
        for leaf in self._leaves(column):
            chunks = [self._file.metadata.row_group(group).column(leaf) for group in range(self._file.metadata.num_row_groups)]
            statistics = [chunk.statistics for chunk in chunks]
            if not all(found is not None and found.has_null_count for found in statistics):
                return None
            counts.append(sum(int(found.null_count) for found in statistics))
        is_list = hasattr(
            self.schema.field(column).type, "value_field"
        )  # the statistics then count elements and empty lists too
        if min(counts) == 0 or (len(counts) == 1 and not is_list):
            return min(counts)
        return None

    def sha256(self) -> str | None:
        with self._path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if _identity(self._path) != self._identity:
            raise DataError(f"{self._path}: was changed while it was read. Run the command again")
        return digest

    def _leaves(self, column: str) -> range:
        """Indices of the Parquet columns that hold a column."""
        index = self.schema.names.index(column)
        first = sum(codec_columns.leaves(self.schema.field(before).type) for before in range(index))
        return range(first, first + codec_columns.leaves(self.schema.field(index).type))

    def _batch_rows(self, columns: Sequence[str]) -> int:
        """Number of rows that fill ``_BATCH_BYTES``, from the size of the columns in the largest row group."""
        row_bytes = 1.0
        for group in range(self._file.metadata.num_row_groups):
            metadata = self._file.metadata.row_group(group)
            size = sum(metadata.column(leaf).total_uncompressed_size for column in columns for leaf in self._leaves(column))
            row_bytes = max(row_bytes, size / max(1, metadata.num_rows))
        return max(1, min(_MAX_BATCH_ROWS, int(_BATCH_BYTES / row_bytes)))


class RemoteParquetTable(ParquetTable):
    """A Parquet file in an object store, such as ``s3://bucket/rows.parquet``. A whole row group is read at once.

    Args:
        uri: of Arrow's file systems (s3, gs, hdfs) or of fsspec's, whose package must be installed.
        name: for messages.
        folder: relative paths of pictures start here.
    """

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.folder = folder
        self._read_schema(name, lambda: self._open(uri))

    def _open(self, uri: str) -> pyarrow.parquet.ParquetFile:
        try:
            self._files, self._key = pyarrow.fs.FileSystem.from_uri(uri)
        except (ValueError, NotImplementedError):  # a scheme that Arrow does not know
            from fsspec.core import url_to_fs  # noqa: PLC0415 - takes time that other sources do without

            try:
                found, self._key = url_to_fs(uri)
            except (ImportError, ValueError) as error:
                raise OSError(f"{error}: no file system for {uri.partition('://')[0]}://") from error
            self._files = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found))
        self._version = self._found()
        return pyarrow.parquet.ParquetFile(self._files.open_input_file(self._key), pre_buffer=True)

    def sha256(self) -> str | None:
        with self._files.open_input_stream(self._key) as stream:
            digest = hashlib.sha256()
            while part := stream.read(_BATCH_BYTES):
                digest.update(part)
        if self._found() != self._version:
            raise DataError(f"{self.name}: was changed while it was read. Run the command again")
        return digest.hexdigest()

    def _found(self) -> tuple[int | None, int | None]:
        """Return what changes when the file is written."""
        info = self._files.get_file_info(self._key)
        return cast("int | None", info.size), cast("int | None", info.mtime_ns)


class ArrowTable(RawTable):
    """A table in memory."""

    def __init__(self, table: pa.Table, name: str, folder: Path, notes: Sequence[str] = ()) -> None:
        self.name, self.folder, self.schema, self.notes = name, folder, table.schema, tuple(notes)
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in self._table.select(list(columns)).to_batches(_MAX_BATCH_ROWS):
            arrays = [codec_columns.without_views(array) for array in batch.columns]
            yield pa.RecordBatch.from_arrays(arrays, list(columns))


class HubTable(RawTable):
    """A ``datasets.Dataset``."""

    _BATCH_ROWS = 128

    def __init__(self, rows: Any, name: str) -> None:
        self.name, self.folder, self.schema = name, Path(), rows.features.arrow_schema
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for table in self._rows.select_columns(list(columns)).with_format("arrow").iter(self._BATCH_ROWS):
            arrays = [codec_columns.without_views(table.column(column).combine_chunks()) for column in columns]
            yield pa.RecordBatch.from_arrays(arrays, list(columns))


def open_folder(path: Path, name: str) -> RawTable:
    """Open a folder of pictures.

    Its columns are ``image`` and the columns of ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, whose column
    ``file_name`` names the picture of a row, relative to the folder of that file. Pictures that it does not name follow, with
    nulls in the other columns. Without such a file, ``label`` is the name of a picture's folder.

    Raises:
        DataError: there are no pictures, or the metadata cannot be read.
    """
    images, metadata = [], []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith((".", "__"))]
        for file in files:
            found = Path(folder, file)
            if file in METADATA_FILES:
                metadata.append(found)
            elif not file.startswith((".", "__")) and found.suffix.lower() in IMAGE_SUFFIXES:
                images.append(found)
    images.sort(key=str)
    if not images:
        raise DataError(
            f"{name}: cannot be opened (no picture is in the folder). Pictures end in {', '.join(IMAGE_SUFFIXES[:4])}"
        )
    if not metadata:
        labels = sorted({image.parent.name for image in images})
        numbers = {label: number for number, label in enumerate(labels)}
        features = {"info": {"features": {"label": {"names": labels, "_type": "ClassLabel"}}}}
        schema = pa.schema([("image", _PATHS), ("label", pa.int64())], {"huggingface": json.dumps(features)})
        rows = [_pictures([str(image) for image in images]), pa.array([numbers[image.parent.name] for image in images])]
        return ArrowTable(pa.Table.from_arrays(rows, schema=schema), name, path)
    return _with_metadata(images, sorted(metadata, key=str), name, path)


def _with_metadata(images: Sequence[Path], files: Sequence[Path], name: str, path: Path) -> RawTable:
    """The rows of the metadata files, then one row for each picture that they do not name."""
    tables, named = [], set[str]()
    for file in files:
        table = _read_metadata(file)
        for index, column in enumerate(table.column_names):
            if column == "file_name" or column.endswith("_file_name"):
                paths = [None if value is None else _picture_path(file, value) for value in table.column(index).to_pylist()]
                named.update(picture for picture in paths if picture is not None)
                table = table.set_column(index, column.removesuffix("file_name").removesuffix("_") or "image", _pictures(paths))
        tables.append(table)
    table = _concatenate(tables, files)
    if not any(field.type == _PATHS for field in table.schema):
        raise DataError(f"{files[0]}: no column is file_name, which names the picture of each row")
    notes = []
    others = [str(image) for image in images if os.path.normpath(image) not in named]
    if others and "image" in table.column_names:
        columns = [column for column in table.column_names if column != "image"]
        notes.append(
            f"{name}: {len(others):,} of {len(images):,} pictures are not named by {files[0].name}. Their {', '.join(columns)} "
            f"are absent. The first is {os.path.relpath(others[0], path)}"
        )
        table = _concatenate([table, pa.table({"image": _pictures(others)})], files)
    return ArrowTable(table, name, path, notes)


def _read_metadata(file: Path) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            return pyarrow.parquet.read_table(file)
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        if file.suffix == ".csv":
            return pyarrow.csv.read_csv(io.BytesIO(content))
        # A block must hold at least one row.
        return pyarrow.json.read_json(io.BytesIO(content), pyarrow.json.ReadOptions(block_size=len(content) + 1))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({type(error).__name__}: {error}). It has one row for each picture") from error


def _picture_path(metadata: Path, value: object) -> str:
    """Path of a picture that a metadata file names, relative to its folder."""
    path = os.path.normpath(metadata.parent / str(value))
    if not isinstance(value, str) or not Path(path).is_relative_to(os.path.normpath(metadata.parent)):
        raise DataError(f"{metadata}: file_name {value!r} is no path inside the folder {metadata.parent}")
    return path


def _pictures(paths: Sequence[str | None]) -> pa.Array:
    return pa.array([None if path is None else {"bytes": None, "path": str(path)} for path in paths], _PATHS)


def _concatenate(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{', '.join(map(str, files))}: have columns of different types ({error}). Write one file") from error


def _identity(path: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced or written."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def cannot_open(name: str, error: BaseException, remedy: str) -> DataError:
    """Return the error for rows that cannot be opened."""
    return DataError(f"{name}: cannot be opened ({type(error).__name__}: {error}). {remedy}")
