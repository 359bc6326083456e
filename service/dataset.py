"""Parquet files with columns added: embeddings, and what is generated from them.

The unit of work is a row group of the source. It is read, embedded and written whole, to a file of its own that appears in one
step. Whoever is killed leaves whole files behind or none, so the same job goes on where it was, and no row is there twice.
"""

import math
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from model import bundle, codec
from model.image import file_from_array
from model.modality import CategoricalModality, ImageModality, Modality, TextModality
from model.runtime import Device, Runtime
from service.scheduler import Row, Scheduler, Silent
from service.work import Outcome, Refine, Work

EMBEDDING = "embedding"
ERROR = "error"
GENERATED = "generated_"
RECORD = "_job.json"
PARTIAL = "_partial"
"""Names that begin with an underscore are no data to those who read a folder of Parquet files."""


class JobError(Exception):
    """A job that must not start. The message says what to do."""


@dataclass(frozen=True)
class Job:
    """What to do with a row. Its embedding is what ``POST /embed`` answers to that row alone, with the same seed."""

    bundle: Path
    columns: Mapping[str, str]
    """Column of each modality; a null is an absent modality. Images: a file's bytes, or the struct of Hugging Face's data sets;
    else the value as in JSON."""
    targets: tuple[str, ...] = ()
    """Modalities to generate, from the mean of the posterior."""
    refine_steps: int = 0
    seed: int = 0
    device: Device = "cpu"
    threads: int = 1
    max_batch: int = 32
    max_pixels: int = 16_000_000


@dataclass(frozen=True)
class Part:
    """A row group."""

    source: str
    row_group: int
    file: str
    """Where its rows go, below the output."""


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path, or of a URI such as ``s3://bucket/folder``, and the path there."""
    if "://" in location:
        filesystem, path = fs.FileSystem.from_uri(location)
        return filesystem, path.rstrip("/")
    return fs.LocalFileSystem(), str(Path(location).absolute())


def plan(job: Job, source: str, output: str) -> tuple[list[Part], int]:
    """The parts that are left to do, and how many there are in all.

    The output keeps a record of the job and of its source files: neither may change between two runs, but files may be added.

    Raises:
        JobError: there is nothing to read, a column is missing or taken, or the output belongs to another job.
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
        stem = name.removesuffix(".parquet")
        parts += [Part(file.path, index, f"{stem}-{index:05d}.parquet") for index in range(metadata.num_row_groups)]
    target, folder = resolve(output)
    target.create_dir(folder, recursive=True)
    _keep_record(job, manifest.sha256, files, target, folder)
    there = {posixpath.relpath(file.path, folder) for file in _parquet_files(target, folder)}
    return [part for part in parts if part.file not in there], len(parts)


class Embedder:
    """Does parts, one after the other.

    Raises:
        bundle.BundleError: the bundle cannot be loaded here.
    """

    def __init__(self, job: Job, source: str, output: str) -> None:
        self._job = job
        self._source, _ = resolve(source)
        self._target, self._folder = resolve(output)
        self._runtime = Runtime.load(job.bundle, device=job.device, threads=job.threads)
        self._scheduler = Scheduler(self._runtime, max_batch=job.max_batch, observer=Silent())
        self._limits = codec.Limits(image_pixels=job.max_pixels)

    def do(self, part: Part) -> tuple[int, int]:
        """Read, embed, write.

        Returns:
            the number of rows, and of those that got no embedding: their ``error`` says why.
        """
        with self._source.open_input_file(part.source) as stream:
            table = self.extend(pq.ParquetFile(stream).read_row_group(part.row_group))
        path = posixpath.join(self._folder, part.file)
        partial = posixpath.join(self._folder, PARTIAL, uuid.uuid4().hex)
        for needed in (partial, path):
            self._target.create_dir(posixpath.dirname(needed), recursive=True)
        pq.write_table(table, partial, filesystem=self._target)
        self._target.move(partial, path)
        return table.num_rows, table.num_rows - table.column(ERROR).null_count

    def extend(self, table: pa.Table) -> pa.Table:
        """The table with the columns embedding, generated_<target> and error. It loses the metadata of its schema."""
        columns = {name: table.column(column).to_pylist() for name, column in self._job.columns.items()}
        answers: list[Outcome | str] = []
        for start in range(0, table.num_rows, self._job.max_batch):
            rows = range(start, min(start + self._job.max_batch, table.num_rows))
            answers += self._embed([{name: values[row] for name, values in columns.items()} for row in rows])
        outcomes = [answer if isinstance(answer, Outcome) else None for answer in answers]
        errors = [answer if isinstance(answer, str) else None for answer in answers]
        means = [None if outcome is None else outcome.mean for outcome in outcomes]
        table = table.replace_schema_metadata(None)
        table = table.append_column(EMBEDDING, pa.array(means, pa.list_(pa.float32(), self._runtime.latent)))
        for modality in self._runtime.modalities:
            if modality.name in self._job.targets:
                values = [None if outcome is None else outcome.generated[modality.name][0] for outcome in outcomes]
                table = table.append_column(GENERATED + modality.name, _column(modality, values))
        return table.append_column(ERROR, pa.array(errors, pa.string()))

    def _embed(self, samples: Sequence[Mapping[str, object]]) -> list[Outcome | str]:
        answers: list[Outcome | str | Row] = []
        for sample in samples:
            try:
                work = Work(
                    self._decode(sample),
                    seed=self._job.seed,
                    index=0,  # as if it came alone
                    refine=Refine(steps=self._job.refine_steps),
                    targets=self._job.targets,
                    latent="mean",
                )
                answers.append(Row(work, monotonic()))
            except codec.CodecError as error:
                answers.append(f"{error.code}: {error.detail}")
        self._scheduler.admit([answer for answer in answers if isinstance(answer, Row)])
        while self._scheduler.active:
            self._scheduler.step()
        return [_told(answer) if isinstance(answer, Row) else answer for answer in answers]

    def _decode(self, sample: Mapping[str, object]) -> dict[str, NDArray[Any]]:
        row = {}
        for modality in self._runtime.modalities:
            value = sample.get(modality.name)
            if isinstance(value, dict) and "bytes" in value:
                value = value["bytes"]
            if value is None:
                continue
            try:
                decode = codec.decode_bytes if isinstance(value, bytes) else codec.decode
                row[modality.name] = decode(modality, value, self._limits)  # type: ignore[arg-type]
            except codec.CodecError as error:
                error.detail = f"{modality.name}: {error.detail}"
                raise
        if not row:
            raise codec.CodecError("wrong_type", "no modality is there")
        return row


def _told(row: Row) -> Outcome | str:
    return row.outcome if isinstance(row.outcome, Outcome) else f"engine_failed: {type(row.outcome).__name__}"


def _column(modality: Modality, values: Sequence[NDArray[Any] | None]) -> pa.Array:
    """Images as Hugging Face's data sets keep them; text and classes as strings; else a list of numbers, as measured."""
    if isinstance(modality, ImageModality) and modality.in_files:
        pictures = [None if v is None else {"bytes": file_from_array(v, "png"), "path": None} for v in values]
        return pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    if isinstance(modality, ImageModality):
        size = math.prod(modality.shape)
        return pa.array([None if v is None else v.ravel() for v in values], pa.list_(pa.float32(), size))
    told = [None if v is None else codec.encode(modality, v) for v in values]
    if isinstance(modality, CategoricalModality):
        return pa.array([None if v is None else v["class"] for v in told], pa.string())
    if isinstance(modality, TextModality):
        return pa.array([None if v is None else v["text"] for v in told], pa.string())
    numbers = [v and (list(v["data"].values()) if isinstance(v["data"], dict) else v["data"]) for v in told]
    return pa.array(numbers, pa.list_(pa.float32(), modality.shape[0]))


def _parquet_files(filesystem: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """In the order of their names; the root itself where it is a file."""
    at_root = filesystem.get_file_info(root)
    if at_root.type == fs.FileType.File:
        return [at_root]
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted((file for file in found if _is_data(posixpath.relpath(file.path, root))), key=lambda file: str(file.path))


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not any(part[0] in "._" for part in name.split("/"))


def _check_names(job: Job, names: Sequence[str]) -> None:
    unknown = sorted({*job.columns, *job.targets} - set(names))
    if unknown:
        raise JobError(f"{job.bundle} has no modality {', '.join(unknown)}: there are {', '.join(names)}")
    if not job.columns:
        raise JobError(f"no column is named: say at least one MODALITY=COLUMN, with a modality of {', '.join(names)}")


def _check_columns(job: Job, file: str, names: Sequence[str]) -> None:
    missing = sorted(set(job.columns.values()) - set(names))
    taken = sorted(set(_added(job)) & set(names))
    if missing or taken:
        wrong = f"has no column {', '.join(missing)}" if missing else f"has a column {', '.join(taken)} already: rename it"
        raise JobError(f"{file}: {wrong}; its columns are {', '.join(names)}")


def _added(job: Job) -> Iterator[str]:
    yield from (EMBEDDING, *(GENERATED + target for target in job.targets), ERROR)


def _keep_record(job: Job, sha256: str, files: Sequence[fs.FileInfo], target: fs.FileSystem, folder: str) -> None:
    asked = {
        "bundle_sha256": sha256,
        "columns": dict(job.columns),
        "targets": list(job.targets),
        "refine_steps": job.refine_steps,
        "seed": job.seed,
    }
    sources = {file.path: [file.size, file.mtime_ns] for file in files}
    path = posixpath.join(folder, RECORD)
    if target.get_file_info(path).type == fs.FileType.File:
        with target.open_input_stream(path) as stream:
            record = orjson.loads(stream.read())
        if record["job"] != asked:
            raise JobError(f"{folder}: holds the results of another job, {record['job']}. Choose another folder, or empty it")
        changed = [name for name, identity in record["sources"].items() if sources.get(name) != identity]
        if changed:
            raise JobError(f"{changed[0]}: changed since {folder} was begun. Choose another folder, or empty it")
    partial = posixpath.join(folder, PARTIAL, uuid.uuid4().hex)
    target.create_dir(posixpath.dirname(partial), recursive=True)
    with target.open_output_stream(partial) as stream:
        stream.write(orjson.dumps({"job": asked, "sources": sources}))
    target.move(partial, path)
