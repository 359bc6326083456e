"""One source of rows, opened with the ``datasets`` library and decoded into arrays by the codec that serving uses."""

import functools
import glob
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from model import codec
from model.bundle import DataSource
from model.modality import ImageModality, Modality, TextModality
from training.config import Place, Source

Split = Literal["train", "test"]
UNKNOWN = -1
"""Label of a row whose class nobody told."""
_CHUNK = 1024
_log = logging.getLogger(__name__)


class DataError(Exception):
    """Data that cannot be trained on. The message names the file, the row where there is one, and the remedy."""


@dataclass(frozen=True)
class Table:
    """The decoded rows of one source."""

    arrays: Mapping[str, Shaped[np.ndarray, "row ..."]]
    """By modality: images as uint8 in [0, 255], others in the modality's dtype; zeros where absent."""
    present: Mapping[str, Bool[np.ndarray, " row"]]
    labels: Int64[np.ndarray, " row"] | None
    """Class numbers, ``UNKNOWN`` where the column holds none. None: the source names no label column."""
    class_names: tuple[str, ...] | None
    facts: DataSource

    def __len__(self) -> int:
        return self.facts.rows


def read_table(
    source: Source, split: Split, modalities: Mapping[str, Modality], folder: Path, class_names: tuple[str, ...] | None = None
) -> Table:
    """Read one split of a source and decode every row.

    Args:
        modalities: by name, at least those of ``source.columns``.
        folder: where paths start.
        class_names: stand for the names that the label column gives.

    Raises:
        DataError: the source is missing, empty or damaged, lacks a column, has labels that are no class numbers, a value that
            is none of its modality, or a row with no modality at all.
    """
    place = source.train if split == "train" else source.test
    file = _title(place)
    rows = _open(place, folder)
    wanted = [*source.columns.values(), *([source.label] if source.label else [])]
    if lacking := sorted(set(wanted) - set(rows.column_names)):
        raise DataError(f"{file}: no column {lacking}. Its columns are {rows.column_names}")
    labels, names = _read_labels(rows, source.label, class_names, file) if source.label else (None, None)
    arrays, present = {}, {}
    for name, column in source.columns.items():
        words = names
        if column != source.label:
            is_class = isinstance(rows.features[column], datasets.ClassLabel)
            words = _read_labels(rows, column, None, file)[1] if is_class else None
        arrays[name], present[name] = _decode_column(rows, column, modalities[name], words, file)
    empty = np.flatnonzero(~np.any(list(present.values()), axis=0))
    if empty.size:
        raise DataError(f"{file}: {empty.size} rows hold no modality at all, the first are {empty[:5].tolist()}. Remove them")
    digest = _sha256(place, folder, [*arrays.values(), *present.values(), *([] if labels is None else [labels])])
    facts = DataSource(file=file, sha256=digest, rows=len(rows), licence=source.licence)
    return Table(arrays, present, labels, names, facts)


def _title(place: Place) -> str:
    if isinstance(place, str):
        return place
    return ":".join(part for part in (place.hub, place.config, place.split, place.revision) if part)


def _open(place: Place, folder: Path) -> datasets.Dataset:
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
            arguments = {"path": "parquet", "data_files": {"rows": glob.escape(str(path))}, "split": "rows"}
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


def _read_labels(
    rows: datasets.Dataset, column: str, class_names: tuple[str, ...] | None, file: str
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    feature = rows.features[column]
    if not (isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))):
        raise DataError(f"{file}: the label column {column!r} holds {feature}. Labels are a ClassLabel or integers from 0")
    labels = rows.select_columns([column]).with_format("arrow")[:].column(column).fill_null(UNKNOWN).to_numpy().astype(np.int64)
    own = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if class_names is not None and own is not None and len(own) != len(class_names):
        raise DataError(f"{file}: {column!r} has {len(own)} classes, data.class_names names {len(class_names)}")
    names = class_names or own
    wrong = np.flatnonzero((labels < UNKNOWN) | (labels >= (len(names) if names else np.inf)))
    if wrong.size:
        allowed = f"0 to {len(names) - 1}" if names else "0 and above"
        raise DataError(
            f"{file}: row {wrong[0]}, label {labels[wrong[0]]}: class numbers are {allowed}, {UNKNOWN} or null where unknown"
        )
    return labels, names


def _decode_column(
    rows: datasets.Dataset, column: str, modality: Modality, names: tuple[str, ...] | None, file: str
) -> tuple[Shaped[np.ndarray, "row ..."], Bool[np.ndarray, " row"]]:
    values = np.zeros((len(rows), *modality.shape), np.uint8 if isinstance(modality, ImageModality) else modality.dtype)
    present = np.zeros(len(rows), dtype=bool)
    decode = _decoder(modality, names)
    began = time.monotonic()
    chunks = rows.select_columns([column]).with_format("arrow").iter(_CHUNK)
    terminal = Console(stderr=True)
    steps = track(chunks, f"{file} {column}", -(-len(rows) // _CHUNK), console=terminal, disable=not sys.stderr.isatty())
    for step, chunk in enumerate(steps):
        for row, value in enumerate(chunk.column(column).to_pylist(), start=step * _CHUNK):
            if value is None or (names and value == UNKNOWN):
                continue
            try:
                values[row] = decode(value)
            except (codec.CodecError, OSError) as error:
                raise DataError(
                    f"{file}: row {row}: column {column!r} holds no {modality.name}: {error}. "
                    "Repair or remove the row; null marks an absent modality"
                ) from error
            present[row] = True
    _log.info("read %d rows of %s %s in %.1f s", len(rows), file, column, time.monotonic() - began)
    return values, present


def _decoder(modality: Modality, names: tuple[str, ...] | None) -> Callable[[Any], NDArray[Any]]:
    if isinstance(modality, ImageModality):
        return lambda value: np.rint(codec.decode_bytes(modality, _image_bytes(value)) * 255)
    if isinstance(modality, TextModality) and names:
        return lambda value: codec.decode(modality, names[value])
    return functools.partial(codec.decode, modality)


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


def _sha256(place: Place, folder: Path, content: list[NDArray[Any]]) -> str:
    """Of the file; of the decoded arrays where the source is no single file."""
    if isinstance(place, str) and (folder / place).is_file():
        with (folder / place).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for array in content:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
