"""What the columns of a Parquet file may be: a kind of modality, the label, the split, or nothing that can be learned from."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute
from PIL import Image

from model.text import pieces
from model.wire import DEFAULT_LIMITS
from training.columns import Rows

Role = Literal["image", "text", "vector", "binary", "categorical", "label", "split", "skipped"]

MOST_WORDS, MOST_CHARACTERS, MOST_CLASSES = 32, 64, 50
SIDE = 64
"""Of a square picture, where the file's pictures differ in size."""
_EXACT_SIDE = 128  # pictures up to it keep their size, where all have the same
_SAMPLE = 200  # pictures looked at
_MOST_CHANNELS = 64  # of ``ImageModality``
_FEW = 10  # so many strings may differ by chance
_GREY = frozenset({"1", "L", "I", "F", "I;16"})
_LABELS = frozenset({"label", "labels", "class", "target", "y", "species"})
_SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev"})
_IDENTITY = re.compile(r"(^|_)(id|ids|uuid|guid|index|url|uri|path|file|filename|hash|md5|sha1|sha256)$")


@dataclass
class Guess:
    """What some columns may be.

    Attributes:
        fields: of the modality, as a configuration names them.
        nulls: rows without a value.
        note: for the reader.
    """

    columns: tuple[str, ...]
    role: Role
    nulls: int
    note: str
    fields: dict[str, Any] = field(default_factory=dict)


def guess(table: datasets.Dataset) -> list[Guess]:
    """One guess for each column; single numbers that are missing in the same rows come together."""
    found: list[Guess] = []
    groups: dict[tuple[str, bytes], list[str]] = {}
    for column in table.column_names:
        feature = table.features[column]
        values = table.data.column(column)
        if pyarrow.types.is_floating(values.type):
            values = pyarrow.compute.if_else(pyarrow.compute.is_nan(values), None, values)
        if values.null_count == len(table):
            found.append(Guess((column,), "skipped", len(table), "empty"))
        elif isinstance(feature, datasets.Value) and (number := _number(column, feature.dtype, values)):
            if isinstance(number, Guess):
                found.append(number)
            else:
                missing = np.packbits(values.is_null().to_numpy(zero_copy_only=False)).tobytes()
                groups.setdefault((number, missing), []).append(column)
        else:
            found.append(_one(table, column, feature, values))
    for (role, _), columns in groups.items():
        nulls = table.data.column(columns[0]).null_count
        if role == "vector":
            found.append(Guess(tuple(columns), "vector", nulls, _told(columns), {"size": len(columns)}))
        else:
            found.append(Guess(tuple(columns), "binary", nulls, _told(columns), {"attributes": columns}))
    return found


def _told(columns: list[str]) -> str:
    return f"{len(columns)} columns of single values" if len(columns) > 1 else "single values"


def _number(column: str, dtype: str, values: Any) -> Guess | Literal["vector", "binary"] | None:
    """A group to join, a guess of its own, or None: no number."""
    if dtype == "bool":
        return "binary"
    if not dtype.startswith(("int", "uint", "float")):
        return None
    distinct = pyarrow.compute.count_distinct(values).as_py()
    whole = not dtype.startswith("float")
    if whole and column.lower() in _LABELS:
        return Guess((column,), "label", values.null_count, f"{distinct} classes")
    if _IDENTITY.search(column.lower()) or (whole and distinct == len(values) > 2):
        return Guess((column,), "skipped", values.null_count, "a number that names the row")
    return "vector"


def _one(table: datasets.Dataset, column: str, feature: Any, values: Any) -> Guess:
    nulls, kind = values.null_count, values.type
    if isinstance(feature, datasets.ClassLabel):
        role: Role = "label" if column.lower() in _LABELS else "categorical"
        return Guess((column,), role, nulls, f"{len(feature.names)} classes")
    of_files = pyarrow.types.is_struct(kind) and {part.name for part in kind} <= {"bytes", "path"}
    if isinstance(feature, datasets.Image) or of_files or _is_of(kind, "binary"):
        return _image(table, column, nulls)
    if _is_of(kind, "string"):
        return _strings(table, column, nulls)
    return _nested(table, column, values)


def _nested(table: datasets.Dataset, column: str, values: Any) -> Guess:
    depth, kind = 0, values.type
    while isinstance(kind, pyarrow.ListType | pyarrow.LargeListType | pyarrow.FixedSizeListType):
        kind, depth = kind.value_type, depth + 1
    numeric = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)
    if depth == 1 and _is_of(kind, "string"):
        return _text(table, column, values.null_count, "several a row, one drawn each epoch")
    if depth == 1 and numeric:
        return _list(column, values)
    if depth == 3 and numeric:
        return _cubes(table, column, values.null_count)
    return Guess((column,), "skipped", values.null_count, f"{values.type}: no kind of modality")


def _cubes(table: datasets.Dataset, column: str, nulls: int) -> Guess:
    shapes = Counter(_shape(value) for _, value in zip(range(_SAMPLE), _values(table, column), strict=False))
    (shape, count), looked_at = shapes.most_common(1)[0], shapes.total()
    if len(shape) != 3 or not (1 <= shape[0] <= _MOST_CHANNELS and min(shape[1:]) >= 2):
        return Guess((column,), "skipped", nulls, "nested lists that are no channels x height x width")
    note = f"lists of {' x '.join(map(str, shape))} numbers in [0, 1]"
    note += f", {looked_at - count} of {looked_at} looked at have another shape" if count < looked_at else ""
    return Guess((column,), "image", nulls, note, dict(zip(("channels", "height", "width"), shape, strict=True)))


def _shape(value: object) -> tuple[int, ...]:
    try:
        return np.array(value, np.float32).shape
    except (TypeError, ValueError):  # lists of different lengths
        return ()


def _is_of(kind: Any, name: Literal["string", "binary"]) -> bool:
    return str(kind) in (name, f"large_{name}", f"{name}_view")


def _values(table: datasets.Dataset, column: str) -> Iterator[Any]:
    rows = Rows("", table, np.arange(len(table)))
    return (value for value in rows.values([column]) if value is not None)


def _image(table: datasets.Dataset, column: str, nulls: int) -> Guess:
    sizes: Counter[tuple[int, int]] = Counter()
    grey, damaged = True, 0
    for _, value in zip(range(_SAMPLE), _values(table, column), strict=False):
        content = value.get("bytes") if isinstance(value, dict) else value
        try:
            with Image.open(io.BytesIO(content) if content else value["path"]) as image:
                sizes[image.height, image.width] += 1
                grey = grey and image.mode in _GREY
        except Exception:  # Pillow raises many kinds, and a path may be none
            damaged += 1
    if not sizes:
        return Guess((column,), "skipped", nulls, "bytes that are no picture")
    (height, width), _ = sizes.most_common(1)[0]
    exact = len(sizes) == 1 and min(height, width) >= 2 and max(height, width) <= _EXACT_SIDE
    fields = {"channels": 1 if grey else 3, "height": height if exact else SIDE, "width": width if exact else SIDE}
    told = f"{len(sizes)} sizes" if len(sizes) > 1 else f"all {height} x {width}"
    told = f"pictures, {told}{f', {damaged} of {damaged + sizes.total()} looked at are damaged' if damaged else ''}"
    return Guess((column,), "image", nulls, told, fields)


def _strings(table: datasets.Dataset, column: str, nulls: int) -> Guess:
    strings = [value.strip() for value in _values(table, column)]
    filled = [value for value in strings if value]
    distinct = set(filled)
    if {"train", "test"} <= distinct <= _SPLITS:
        return Guess((column,), "split", nulls, f"says {', '.join(sorted(distinct))}")
    if _IDENTITY.search(column.lower()):
        return Guess((column,), "skipped", nulls, "a name of the row")
    if not filled:
        return Guess((column,), "skipped", nulls, "blank in every row")
    words = np.mean([len(pieces(value[:1000], "word", lowercase=True)) for value in filled])
    if words < 2 and len(distinct) == len(filled) > _FEW:
        return Guess((column,), "skipped", nulls, "a name of the row, never the same twice")
    if words < 3 and 2 <= len(distinct) <= min(MOST_CLASSES, len(filled) / 3):
        role: Role = "label" if column.lower() in _LABELS else "categorical"
        return Guess((column,), role, nulls + len(strings) - len(filled), f"{len(distinct)} classes")
    return _text(table, column, nulls, "")


def _text(table: datasets.Dataset, column: str, nulls: int, told: str) -> Guess:
    counts: dict[str, list[int]] = {"word": [], "character": []}
    for value in _values(table, column):
        for text in value if isinstance(value, list) else [value]:
            if text and text.strip():
                shown = text[: DEFAULT_LIMITS.text_characters]
                for unit, lengths in counts.items():
                    lengths.append(len(pieces(shown, unit, lowercase=True)))
    if not counts["word"]:
        return Guess((column,), "skipped", nulls, "blank in every row")
    unit, most = ("word", MOST_WORDS) if np.mean(counts["word"]) >= 2 else ("character", MOST_CHARACTERS)
    longest = max(1, *counts[unit])
    fields: dict[str, Any] = {"unit": unit, "length": min(longest, most)}
    if longest > most:
        fields["too_long"] = "cut"
    note = f"texts of {min(counts[unit])} to {longest} {unit}s"
    return Guess((column,), "text", nulls, f"{note}, {told}" if told else note, fields)


def _list(column: str, values: Any) -> Guess:
    lengths = Counter(pyarrow.compute.list_value_length(values).drop_null().to_pylist())
    (size, count), others = lengths.most_common(1)[0], lengths.total()
    if size == 0 or count < others / 2:
        return Guess((column,), "skipped", values.null_count, f"lists of {len(lengths)} lengths")
    note = f"{size} numbers" + (f", {others - count} rows have another number of them" if count < others else "")
    distinct = pyarrow.compute.unique(pyarrow.compute.list_flatten(values).combine_chunks()).to_pylist()
    if set(distinct) <= {0, 1}:
        return Guess((column,), "binary", values.null_count, note, {"attributes": [f"{column}_{n}" for n in range(size)]})
    return Guess((column,), "vector", values.null_count, note, {"size": size})
