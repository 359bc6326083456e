"""Embeddings of Parquet files, written as Parquet files with added columns.

The unit of work is a row group of the source. It is read, embedded and written to a file that appears in one step. A killed
worker leaves complete files only, so the same job continues where it stopped, and no row is written twice.
"""

import math
import posixpath
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from concord.model import bundle, codec
from concord.model.codec.audio import samples_from_array, wav_from_samples
from concord.model.codec.columns import (
    Cell,
    ColumnReader,
    class_names,
    number_range,
    stored_range,
    white_level,
    without_views,
)
from concord.model.codec.image import file_from_array
from concord.model.modality import AudioModality, CategoricalModality, ImageModality, Modality, TextModality, is_picture
from concord.model.runtime import Runtime
from concord.service.inference.jobs import InferenceJob, InferenceResult, RefinementLimits
from concord.service.inference.scheduler import NullObserver, Row, Scheduler

EMBEDDING = "embedding"
ERROR = "error"
GENERATED = "generated_"
RECORD = "_job.json"
PARTIAL = "_partial"
"""Readers of a folder of Parquet files skip names that begin with an underscore."""
SUFFIXES = (".parquet", ".pq")
"""Of Parquet files, in lower or upper case."""
_EMPTY = "every modality is absent"
"""Detail of the error of a row without values."""


class JobError(Exception):
    """A job that must not start. The message says what to do."""


@dataclass(frozen=True)
class BatchJob:
    """What to do with each row. Its embedding equals that of ``POST /embed`` for that row alone, with the same seed."""

    bundle: Path
    columns: Mapping[str, str | tuple[str, ...]]
    """Column of each modality, or several columns of single numbers; ``codec.columns`` says what they may hold. A name that is
    not a column may be several names with commas between them. Of several texts in a row, the first one is embedded;
    with a frozen encoder, all of them are: the mean of their features."""
    targets: tuple[str, ...] = ()
    """Modalities to generate, from the mean of the posterior."""
    refine_steps: int = 0
    seed: int = 0
    runtime_options: Mapping[str, Any] = field(default_factory=lambda: {"threads": 1})
    """Keyword arguments of ``Runtime``."""
    max_batch: int = 32
    max_pixels: int = 16_000_000
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By modality, the names of the class numbers in its column, in their order. Left out: those that the file states."""
    data: str | None = None
    """Folder where relative paths of pictures start. If a picture is not there: at the folder of its Parquet file."""


class Done(NamedTuple):
    """Number of rows of a part, of rows without an embedding, and why the first of these has none.

    Rows in which every modality is absent give the reason only if there are no others.
    """

    rows: int
    failed: int
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """One row group."""

    source: str
    row_group: int
    file: str
    """Output file, relative to the output folder."""


def columns_from_options(options: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """``BatchJob.columns`` of options MODALITY=COLUMN. A modality that is given again has all of its columns."""
    columns: dict[str, tuple[str, ...]] = {}
    for option in options:
        name, _, column = option.partition("=")
        columns[name] = (*columns.get(name, ()), column)
    return {name: given[0] if len(given) == 1 else given for name, given in columns.items()}


def class_names_from_options(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``BatchJob.class_names`` of options MODALITY=NAME,NAME."""
    return {name: tuple(names.split(",")) for name, _, names in (option.partition("=") for option in options)}


def summary(done: Sequence[Done], total: int) -> str:
    """What a run did, in words.

    Args:
        done: each part of the run.
        total: number of parts of the job, those of earlier runs included.
    """
    rows, failed = sum(part.rows for part in done), sum(part.failed for part in done)
    return f"{rows} rows in {len(done)} files, {failed} without embedding; {total - len(done)} files were there already"


def reason_of_failure(done: Sequence[Done]) -> str:
    """Why no row of a run has an embedding. Empty if there is a row that has one, or no row at all."""
    failed = [part for part in done if part.failed]
    if not failed or any(part.failed < part.rows for part in done):
        return ""
    return (
        f"no row has an embedding. The first: {_reason([part.reason for part in failed])}. Compare the columns with the "
        "modalities of the bundle: GET /v1/models, or its README.md. The column error has the reason of each row. Then choose "
        "another output folder"
    )


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path, or of a URI such as ``s3://bucket/folder``, and the path there."""
    if "://" in location:
        filesystem, path = fs.FileSystem.from_uri(location)
        return filesystem, path.rstrip("/")
    return fs.LocalFileSystem(), str(Path(location).absolute())


def plan(job: BatchJob, source: str, output: str) -> tuple[list[Part], int]:
    """The parts that are left to do, and the number of all parts.

    The output holds a record of the job and of its source files: neither may change between two runs, but files may be added.

    Raises:
        JobError: there are no files, a column is missing or its name is taken, or the output belongs to another job.
    """
    filesystem, root = resolve(source)
    manifest = bundle.read(job.bundle)
    _check_names(job, [m.name for m in manifest.manifest.modalities])
    files = _parquet_files(filesystem, root)
    if not files:
        raise JobError(f"{source}: there are no Parquet files. Name one, or a folder of them")
    parts = []
    for file in files:
        metadata = pq.read_metadata(file.path, filesystem=filesystem)
        _check_columns(job, file.path, metadata.schema.to_arrow_schema().names)
        name = posixpath.relpath(file.path, root) if file.path != root else file.base_name
        stem = name.removesuffix(".parquet")  # other suffixes stay: a.pq and a.parquet may lie side by side
        parts += [Part(file.path, index, f"{stem}-{index:05d}.parquet") for index in range(metadata.num_row_groups)]
    target, folder = resolve(output)
    target.create_dir(folder, recursive=True)
    _keep_record(job, manifest.sha256, files, target, folder)
    there = {posixpath.relpath(file.path, folder) for file in _parquet_files(target, folder)}
    return [part for part in parts if part.file not in there], len(parts)


class Embedder:
    """Processes parts, one after the other.

    Raises:
        bundle.BundleError: the bundle cannot be loaded here.
    """

    def __init__(self, job: BatchJob, source: str, output: str) -> None:
        self._job = job
        self._source, _ = resolve(source)
        self._target, self._folder = resolve(output)
        self._runtime = Runtime.load(job.bundle, **job.runtime_options)
        rows = job.max_batch  # of a batch, which is refined to its end before the next one
        self._scheduler = Scheduler(self._runtime, max_batch=rows, max_rows=rows, observer=NullObserver())
        self._limits = codec.Limits(image_pixels=job.max_pixels)

    def process(self, part: Part) -> Done:
        """Read a row group, embed it, write it."""
        with self._source.open_input_file(part.source) as stream:
            file = pq.ParquetFile(stream)
            table = self._extend(file.read_row_group(part.row_group), self._readers(file, part.source))
        path = posixpath.join(self._folder, part.file)
        partial = posixpath.join(self._folder, PARTIAL, uuid.uuid4().hex)
        for file in (partial, path):
            self._target.create_dir(posixpath.dirname(file), recursive=True)
        pq.write_table(table, partial, filesystem=self._target)
        self._target.move(partial, path)
        errors = table.column(ERROR).drop_null().to_pylist()
        return Done(table.num_rows, len(errors), _reason(errors))

    def _readers(self, file: pq.ParquetFile, source: str) -> dict[str, ColumnReader]:
        """The reader of each modality's columns."""
        readers, preprocessors = {}, self._runtime.preprocessors
        modalities = {modality.name: modality for modality in self._runtime.modalities}
        for name, columns in resolve_columns(self._job, file.schema_arrow.names).items():
            white = 1.0
            if is_picture(modalities[name]) and hasattr(file.schema_arrow.field(columns[0]).type, "value_field"):
                white = white_level(stored_range(file, columns[0]) or _scanned_range(file, columns[0]))
            names = self._job.class_names.get(name) or class_names(file.schema_arrow.metadata, columns[0])
            read_file = _read_from(self._picture_folders(source), self._limits)
            readers[name] = ColumnReader(
                modalities[name], columns, names, white, read_file, False, self._limits, preprocessors.get(name)
            )
        return readers

    def _picture_folders(self, source: str) -> list[tuple[fs.FileSystem, str]]:
        folders = [resolve(self._job.data)] if self._job.data is not None else []
        return [*folders, (self._source, posixpath.dirname(source))]

    def _extend(self, table: pa.Table, readers: Mapping[str, ColumnReader]) -> pa.Table:
        """The table with the columns embedding, generated_<target> and error, without the metadata of its schema."""
        used = list(dict.fromkeys(column for reader in readers.values() for column in reader.columns))
        outcomes: list[InferenceResult | str] = []
        for batch in table.select(used).to_batches(max_chunksize=self._job.max_batch):
            arrays = {column: without_views(batch.column(index)) for index, column in enumerate(used)}
            cells = [reader.cells([arrays[column] for column in reader.columns]) for reader in readers.values()]
            outcomes += self._embed([dict(zip(readers, row, strict=True)) for row in zip(*cells, strict=True)])
        results = [outcome if isinstance(outcome, InferenceResult) else None for outcome in outcomes]
        errors = [outcome if isinstance(outcome, str) else None for outcome in outcomes]
        means = [None if result is None else result.mean for result in results]
        table = table.replace_schema_metadata(None)
        table = table.append_column(EMBEDDING, pa.array(means, pa.list_(pa.float32(), self._runtime.latent)))
        for modality in self._runtime.modalities:
            if modality.name in self._job.targets:
                values = [None if result is None else result.generated[modality.name][0] for result in results]
                table = table.append_column(GENERATED + modality.name, _column(modality, values))
        return table.append_column(ERROR, pa.array(errors, pa.string()))

    def _embed(self, items: Sequence[Mapping[str, Cell]]) -> list[InferenceResult | str]:
        """A result for each item, or why there is none."""
        rows: list[Row | str] = []
        for item in items:
            try:
                job = InferenceJob(
                    _arrays(item),
                    seed=self._job.seed,
                    index=0,  # as in a request with this row alone
                    refine=RefinementLimits(steps=self._job.refine_steps),
                    targets=self._job.targets,
                    latent="mean",
                )
                rows.append(Row(job, monotonic()))
            except codec.CodecError as error:
                rows.append(f"{error.code}: {error.detail}")
        self._scheduler.add([row for row in rows if isinstance(row, Row)])
        while self._scheduler.active:
            self._scheduler.step()
        return [_outcome(row) if isinstance(row, Row) else row for row in rows]


def _arrays(item: Mapping[str, Cell]) -> dict[str, NDArray[Any]]:
    """The array of each modality that is present.

    Raises:
        codec.CodecError: a cell cannot be parsed, or every modality is absent.
    """
    for name, cell in item.items():
        if cell.error is not None:
            raise codec.CodecError(cell.error.code, f"{name}: {cell.error.detail}")
    row = {name: cell.values[0] for name, cell in item.items() if cell.values}
    if not row:
        raise codec.CodecError("wrong_type", _EMPTY)
    return row


def _reason(errors: Sequence[str]) -> str:
    """The first of the errors that says more than that a row is empty. If there is none: the first."""
    informative = [error for error in errors if not error.endswith(_EMPTY)]
    return next(iter(informative or errors), "")


def _read_from(folders: Sequence[tuple[fs.FileSystem, str]], limits: codec.Limits) -> Callable[[str], bytes]:
    """Function that returns the content of a file, which is looked up in each of the folders, in this order."""

    def read(path: str) -> bytes:
        for filesystem, folder in folders:
            try:
                info = filesystem.get_file_info(posixpath.join(folder, path))
                if info.type != fs.FileType.File:
                    continue
                if info.size > limits.file_bytes:
                    raise codec.CodecError("too_large", f"{info.path} has {info.size} bytes, {limits.file_bytes} are allowed")
                with filesystem.open_input_stream(info.path) as stream:
                    return bytes(stream.read())
            except (OSError, pa.ArrowException) as error:
                raise OSError(f"{path!r} cannot be read: {error}") from error
        places = " or ".join(dict.fromkeys(folder for _, folder in folders))
        raise FileNotFoundError(f"no such file: {path!r} in {places}")

    return read


def _scanned_range(file: pq.ParquetFile, column: str) -> tuple[float, float] | None:
    """Smallest and largest number of a column of a file without statistics."""
    batches = file.iter_batches(1024, columns=[column])
    ranges = [found for batch in batches if (found := number_range(batch.column(column)))]
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


def _outcome(row: Row) -> InferenceResult | str:
    return row.result if isinstance(row.result, InferenceResult) else f"engine_failed: {type(row.result).__name__}"


def _column(modality: Modality, values: Sequence[NDArray[Any] | None]) -> pa.Array:
    """Images and sounds as in Hugging Face's data sets; text and classes as strings; other kinds as lists of numbers in their
    units."""
    if codec.media_types(modality):
        files = [None if v is None else {"bytes": _file(modality, v), "path": None} for v in values]
        return pa.array(files, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    if isinstance(modality, ImageModality):
        size = math.prod(modality.shape)
        return pa.array([None if v is None else v.ravel() for v in values], pa.list_(pa.float32(), size))
    rendered = [None if v is None else codec.render(modality, v) for v in values]
    if isinstance(modality, CategoricalModality):
        return pa.array([None if v is None else v["class"] for v in rendered], pa.string())
    if isinstance(modality, TextModality):
        return pa.array([None if v is None else v["text"] for v in rendered], pa.string())
    numbers = [v and (list(v["data"].values()) if isinstance(v["data"], dict) else v["data"]) for v in rendered]
    return pa.array(numbers, pa.list_(pa.float32(), modality.shape[0]))


def _file(modality: Modality, value: NDArray[Any]) -> bytes:
    if isinstance(modality, AudioModality):
        return wav_from_samples(samples_from_array(modality, value), modality.sample_rate)
    return file_from_array(value, "png")


def _parquet_files(filesystem: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """In the order of their names; the root itself if it is a file."""
    at_root = filesystem.get_file_info(root)
    if at_root.type == fs.FileType.File:
        return [at_root]
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted((file for file in found if _is_data(posixpath.relpath(file.path, root))), key=lambda file: str(file.path))


def _is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part[0] in "._" for part in name.split("/"))


def _check_names(job: BatchJob, names: Sequence[str]) -> None:
    unknown = sorted({*job.columns, *job.targets, *job.class_names} - set(names))
    if unknown:
        raise JobError(f"{job.bundle} has no modality {', '.join(unknown)}: there are {', '.join(names)}")
    if not job.columns:
        raise JobError(f"no column is given: give at least one MODALITY=COLUMN, with a modality of {', '.join(names)}")


def resolve_columns(job: BatchJob, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns of each modality. A given name that is no column is several names with commas between them.

    Args:
        names: of the columns in the file.
    """
    resolved = {}
    for modality, given in job.columns.items():
        parts = [[name] if name in names else name.split(",") for name in ([given] if isinstance(given, str) else given)]
        resolved[modality] = tuple(name for part in parts for name in part)
    return resolved


def _check_columns(job: BatchJob, file: str, names: Sequence[str]) -> None:
    used = {column for columns in resolve_columns(job, names).values() for column in columns}
    missing = sorted(used - set(names))
    taken = sorted(set(_added(job)) & set(names))
    if repeated := sorted(column for column in used if names.count(column) > 1):
        raise JobError(f"{file}: has more than one column {', '.join(repeated)}. Rename all but one of each")
    if missing or taken:
        wrong = f"has no column {', '.join(missing)}" if missing else f"has a column {', '.join(taken)} already: rename it"
        raise JobError(f"{file}: {wrong}; its columns are {', '.join(names)}")


def _added(job: BatchJob) -> Iterator[str]:
    yield from (EMBEDDING, *(GENERATED + target for target in job.targets), ERROR)


def _keep_record(job: BatchJob, sha256: str, files: Sequence[fs.FileInfo], target: fs.FileSystem, folder: str) -> None:
    description = {
        "bundle_sha256": sha256,
        "columns": {name: column if isinstance(column, str) else list(column) for name, column in job.columns.items()},
        "targets": list(job.targets),
        "refine_steps": job.refine_steps,
        "seed": job.seed,
    }
    # Left out if they are not given, as in records of earlier versions.
    description |= {"class_names": {name: list(names) for name, names in job.class_names.items()}} if job.class_names else {}
    description |= {} if job.data is None else {"data": job.data}
    sources = {file.path: [file.size, file.mtime_ns] for file in files}
    path = posixpath.join(folder, RECORD)
    if target.get_file_info(path).type == fs.FileType.File:
        with target.open_input_stream(path) as stream:
            record = orjson.loads(stream.read())
        if record["job"] != description:
            raise JobError(f"{folder}: holds the results of another job, {record['job']}. Choose another folder, or empty it")
        changed = [name for name, identity in record["sources"].items() if sources.get(name) != identity]
        if changed:
            raise JobError(f"{changed[0]}: changed since {folder} was begun. Choose another folder, or empty it")
    partial = posixpath.join(folder, PARTIAL, uuid.uuid4().hex)
    target.create_dir(posixpath.dirname(partial), recursive=True)
    with target.open_output_stream(partial) as stream:
        stream.write(orjson.dumps({"job": description, "sources": sources}))
    target.move(partial, path)
