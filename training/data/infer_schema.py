"""Schema inference: which modality kind, label or split each column of a table most likely holds.

Columns are read one after the other, in batches, and only as far as needed: memory does not grow with the table.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from concord.model.codec import audio
from concord.model.codec import columns as codec_columns
from concord.model.codec.errors import DEFAULT_LIMITS, CodecError
from concord.model.codec.text import is_unspaced, tokenize
from concord.model.modality import AudioModality, ImageModality
from concord.training.data.sources import TEST_NAMES, TRAIN_NAME
from concord.training.data.tables import AUDIO_SUFFIXES, IMAGE_SUFFIXES, RawTable

Role = Literal["image", "audio", "text", "vector", "binary", "categorical", "label", "split", "skipped"]

MAX_WORDS, MAX_CHARACTERS, MAX_CLASSES = 32, 64, 50
SIDE = 64
"""Height and width in pixels that are suggested when the file's images differ in size."""
_MAX_NATIVE_SIDE = 128
"""Images of one common size keep it up to this height and width, in pixels."""
_MIN_PLANE_SIDE = 8
"""Nested lists of two levels are taken for a grey picture from this height and width on, in pixels."""
_MAX_SAMPLED_VALUES = 200
"""Images and sounds that are opened per column."""
_MAX_RATE = 16_000
"""Highest sample rate that is suggested, in Hz: it carries speech."""
_MAX_SECONDS = 4.0
"""Longest sound that is suggested."""
_LONG = 95
"""Percentile of the lengths of sounds that is suggested as their length."""
_MAX_SAMPLED_TEXTS = 20_000
"""Texts per column that are split into words. Of the others, only those that may be longer are."""
_MAX_DISTINCT = 100_000
"""Numbers or strings are taken for identifiers if this many of them are all different."""
_MAX_CHANNELS = 64
"""Limit of ``ImageModality``."""
_CHARACTERS_PER_WORD = 3
"""Characters that count as one word in scripts without spaces between words."""
_MIN_IDENTIFIERS = 10
"""Distinct strings are taken for identifiers above this count: fewer may differ by chance."""
_SAMPLED_ROWS = 5_000
"""Rows in which classes of different columns are compared."""
_DETERMINED = 0.02
"""A column is determined by another one if it leaves at most this share of its entropy open."""
_MIN_NATURAL_SIDE = 48
"""Colour pictures suit a pretrained network from this height and width on, in pixels."""
_MIN_SENTENCE_WORDS = 4
"""Texts suit a pretrained network from this mean number of words on."""
_GREY_MODES = frozenset({"1", "L", "I", "F", "I;16"})
_LABEL_NAMES = frozenset({"label", "labels", "class", "target", "y", "species"})
_SPLIT_NAMES = frozenset({TRAIN_NAME, *TEST_NAMES})
_SPLIT_COLUMNS = frozenset({"split", "splits", "fold", "part", "partition", "subset", "set", "phase"})
_IDENTIFIER = re.compile(r"(^|_)(id|ids|uuid|guid|index|url|uri|path|file|filename|hash|md5|sha1|sha256)$")

_ANY_IMAGE = ImageModality(name="image", channels=3, height=2, width=2)
_ANY_SOUND = AudioModality(name="sound", seconds=1.0)

ReadFile = Callable[[str], bytes]


@dataclass
class ColumnSchema:
    """The inferred role of one column or of a group of columns.

    Attributes:
        columns: column names; more than one for single numbers that form a vector or a set of attributes.
        role: kind of modality, label, split, or skipped.
        nulls: number of rows without a value.
        note: description for the user.
        fields: fields of the modality in a configuration.
        suits_encoder: whether the values are pictures or texts as pretrained networks were trained on.
    """

    columns: tuple[str, ...]
    role: Role
    nulls: int
    note: str
    fields: dict[str, Any] = field(default_factory=dict)
    suits_encoder: bool = False


def infer_schema(table: RawTable, folder: Path | None = None) -> list[ColumnSchema]:
    """Infer the role of every column. Columns of single numbers that are missing in the same rows form one group.

    Args:
        folder: relative paths of pictures start here, or at the table's folder.
    """
    read_file = codec_columns.read_from(*([folder] if folder else []), table.folder)
    schemas: list[ColumnSchema] = []
    groups: dict[tuple[Role, str], list[str]] = {}
    group_nulls: dict[str, int] = {}
    for column in table.column_names:
        observed = _observe(table, column, read_file)
        schema = observed.schema()
        if isinstance(observed, _Numbers) and schema.role in ("vector", "binary"):
            groups.setdefault((schema.role, observed.null_mask), []).append(column)
            group_nulls[column] = schema.nulls
        else:
            schemas.append(schema)
    for (role, _), columns in groups.items():
        note = f"{len(columns)} columns of single values" if len(columns) > 1 else "single values"
        fields: dict[str, Any] = {"size": len(columns)} if role == "vector" else {"attributes": columns}
        schemas.append(ColumnSchema(tuple(columns), role, group_nulls[columns[0]], note, fields))
    return schemas


def propose_encoders(schemas: Sequence[ColumnSchema], encoders: Mapping[str, str]) -> list[ColumnSchema]:
    """Return the schemas with a frozen encoder where the values suit one and it is available.

    Args:
        encoders: names of available encoders by kind.
    """
    proposed = []
    for schema in schemas:
        if schema.suits_encoder and schema.role in encoders:
            cut = {"too_long": "cut"} if schema.role == "text" else {}
            proposed.append(replace(schema, fields={"encoder": encoders[schema.role], **cut}))
        else:
            proposed.append(schema)
    return proposed


def limit_modalities(table: RawTable, schemas: Sequence[ColumnSchema], maximum: int) -> list[ColumnSchema]:
    """Return the schemas with at most ``maximum`` modalities. The others are skipped, with the reason in their note.

    Columns that another column determines are left out first, then the last ones. A column that is determined and kept has that
    in its note.
    """
    determined = _determined(table, [schema.columns[0] for schema in schemas if schema.role == "categorical"])
    modalities = [schema for schema in schemas if schema.role not in ("label", "split", "skipped")]
    candidates = [schema for schema in modalities if schema.columns[0] in determined]
    candidates.sort(key=lambda schema: determined[schema.columns[0]][1])
    redundant = {schema.columns[0] for schema in candidates[: max(0, len(modalities) - maximum)]}
    omitted: dict[tuple[str, ...], str] = {}
    for column in redundant:
        omitted[column,] = f"left out: {_source(column, determined, redundant)} determines it"
    remaining = [schema for schema in modalities if schema.columns not in omitted]
    omitted |= {schema.columns: f"left out: {maximum} modalities are the maximum" for schema in remaining[maximum:]}
    limited = []
    for schema in schemas:
        if schema.columns in omitted:
            limited.append(replace(schema, role="skipped", note=f"{omitted[schema.columns]} ({schema.note})"))
        elif schema in candidates:
            note = f"{schema.note}; {_source(schema.columns[0], determined, redundant)} determines it"
            limited.append(replace(schema, note=note))
        else:
            limited.append(schema)
    return limited


def _source(column: str, determined: dict[str, tuple[str, float]], omitted: set[str]) -> str:
    """Return the column that determines a column. If that one is omitted, the column that determines it in turn."""
    sources = [determined[column][0]]
    while sources[-1] in omitted and determined[sources[-1]][0] not in (column, *sources):
        sources.append(determined[sources[-1]][0])
    return sources[-1]


def _determined(table: RawTable, columns: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return, for each column of classes that another one determines, that one and the share of the entropy it leaves open.

    Of two columns that determine each other, the first one is not in the result.
    """
    if len(columns) < 2:
        return {}
    stride, start = max(1, len(table) // _SAMPLED_ROWS), 0
    sampled: list[list[Any]] = [[] for _ in columns]
    for batch in table.batches(columns):
        first = -start % stride
        for values, array in zip(sampled, batch.columns, strict=True):
            values.extend(array.slice(first).to_pylist()[::stride])
        start += batch.num_rows
    codes = [np.unique([str(value) for value in values], return_inverse=True)[1] for values in sampled]
    shares = [[_open_share(one, other) for other in codes] for one in codes]
    found: dict[str, tuple[str, float]] = {}
    for index, column in enumerate(columns):
        sources = [
            (share, other)
            for other, share in enumerate(shares[index])
            if other != index and share <= _DETERMINED and (shares[other][index] > _DETERMINED or other < index)
        ]
        if sources:
            open_share, other = min(sources)
            found[column] = (columns[other], open_share)
    return found


def _open_share(codes: NDArray[np.int64], given: NDArray[np.int64]) -> float:
    """Return the share of a column's entropy that another column leaves open: 0 if that one determines it."""
    entropy = _entropy(codes)
    # A column with almost as many classes as rows would determine every other one.
    if entropy == 0 or given.max() + 1 > len(given) / 10:
        return 1.0
    return max(0.0, (_entropy(given, codes) - _entropy(given)) / entropy)


def _entropy(*codes: NDArray[np.int64]) -> float:
    """Entropy in nats of the joint distribution of one or two columns."""
    joint = codes[0] if len(codes) == 1 else codes[0] * (codes[1].max() + 1) + codes[1]
    _, counts = np.unique(joint, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class _Observer:
    """What is known of a column after some of its rows."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.rows = 0
        self.nulls = 0
        self.is_clear = False
        """Whether further rows change the number of nulls only."""

    def add(self, array: pa.Array) -> None:
        """Take further rows into account."""
        self.rows += len(array)
        self.nulls += array.null_count
        if not self.is_clear:
            self._add(array)

    def _add(self, array: pa.Array) -> None:
        raise NotImplementedError

    def schema(self) -> ColumnSchema:
        """Return the role of the column."""
        return self._skipped("empty") if self.nulls == self.rows else self._schema()

    def _schema(self) -> ColumnSchema:
        raise NotImplementedError

    def _is(self, role: Role, note: str, fields: dict[str, Any] | None = None) -> ColumnSchema:
        return ColumnSchema((self.column,), role, self.nulls, note, fields or {})

    def _skipped(self, note: str) -> ColumnSchema:
        return self._is("skipped", note)

    @property
    def _has_label_name(self) -> bool:
        return self.column.lower() in _LABEL_NAMES

    @property
    def _has_identifier_name(self) -> bool:
        return _IDENTIFIER.search(self.column.lower()) is not None


def _observe(table: RawTable, column: str, read_file: ReadFile) -> _Observer:
    """Read a column as far as needed."""
    observer = _observer(table, column, read_file)
    stated = table.null_count(column)
    for batch in table.batches([column]) if not isinstance(observer, _Unsupported) else ():
        observer.add(batch.column(0))
        if observer.is_clear and stated is not None:
            observer.nulls = stated
            break
    observer.rows = len(table)
    return observer


def _observer(table: RawTable, column: str, read_file: ReadFile) -> _Observer:
    kind = codec_columns.plain_type(table.schema.field(column).type)
    depth, element = 0, kind
    while hasattr(element, "value_field") and not pa.types.is_map(element):
        element, depth = element.value_type, depth + 1
    is_number = _is_number(element)
    observer: _Observer
    if names := table.class_names(column):
        observer = _ClassLabels(column, names)
    elif depth == 0 and is_number:
        observer = _Numbers(column, kind, has_nulls=table.null_count(column) != 0)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        observer = _Strings(column, read_file)
    elif codec_columns.holds_samples(kind):
        observer = _Samples(column, read_file)
    elif _is_binary(kind) or (pa.types.is_struct(kind) and {part.name for part in kind} <= {"bytes", "path"}):
        observer = _Files(column, read_file)
    elif depth == 1 and (pa.types.is_string(element) or pa.types.is_large_string(element)):
        observer = _TextLists(column)
    elif depth == 1 and is_number:
        observer = _NumberLists(column)
    elif depth in (2, 3) and is_number:
        observer = _NestedImages(column, lambda: table.value_range(column))
    else:
        observer = _Unsupported(column, table.schema.field(column).type, len(table))
    return observer


def _is_number(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


class _Unsupported(_Observer):
    def __init__(self, column: str, kind: Any, rows: int) -> None:
        super().__init__(column)
        self._kind = kind
        self.nulls = rows if pa.types.is_null(kind) else 0

    def _schema(self) -> ColumnSchema:
        return self._skipped(f"unsupported type {self._kind}")


class _ClassLabels(_Observer):
    """Class numbers with names."""

    def __init__(self, column: str, names: tuple[str, ...]) -> None:
        super().__init__(column)
        self._names = names
        self._found: set[object] = set()

    def _add(self, array: pa.Array) -> None:
        found = Counter(array.to_pylist())
        self.nulls += found.pop(codec_columns.UNKNOWN_CLASS, 0)
        self._found.update(found)

    def _schema(self) -> ColumnSchema:
        found = {self._names[number] for number in self._found if isinstance(number, int) and 0 <= number < len(self._names)}
        if {TRAIN_NAME} < found <= _SPLIT_NAMES:
            return self._is("split", f"values {', '.join(sorted(found))}")
        if len(found) < 2:
            return self._skipped("the same class in every row")
        note = f"{len(found)} classes" if len(found) == len(self._names) else f"{len(found)} of its {len(self._names)} classes"
        return self._is("label" if self._has_label_name else "categorical", note)


class _Distinct:
    """Which values occur, up to a limit, and whether one occurs twice."""

    def __init__(self) -> None:
        self.values: set[Any] = set()
        self.repeats = False
        self.is_full = False

    def add(self, values: Sequence[Any]) -> None:
        if self.is_full:
            return
        before = len(self.values)
        self.values.update(values)
        self.repeats = self.repeats or len(self.values) < before + len(values)
        self.is_full = len(self.values) >= _MAX_DISTINCT or (self.repeats and len(self.values) > 1000)

    def __str__(self) -> str:
        return f"more than {1000:,}" if len(self.values) > 1000 else str(len(self.values))


class _Numbers(_Observer):
    """Single numbers or truth values."""

    def __init__(self, column: str, kind: Any, *, has_nulls: bool) -> None:
        super().__init__(column)
        self._is_boolean, self._is_integer = pa.types.is_boolean(kind), pa.types.is_integer(kind)
        self._has_nulls = has_nulls or pa.types.is_floating(kind)
        self._distinct = _Distinct()
        self._is_whole = True
        self._mask = hashlib.sha256()

    @property
    def null_mask(self) -> str:
        """The same for columns that are null in the same rows."""
        return self._mask.hexdigest() if self.nulls else ""

    def _add(self, array: pa.Array) -> None:
        numbers = array.cast("float64", safe=False).to_numpy(zero_copy_only=False)
        is_null = np.isnan(numbers)
        self.nulls += int(is_null.sum()) - array.null_count
        self._mask.update(is_null.tobytes())
        if not self._distinct.is_full:
            present = numbers[~is_null]
            self._is_whole = self._is_whole and bool((present == np.rint(present)).all())
            self._distinct.add(present.tolist())
        self.is_clear = self._distinct.is_full and not self._has_nulls

    def _schema(self) -> ColumnSchema:
        is_different = not self._distinct.repeats and not self.nulls and self.rows > 2
        if self._has_label_name and self._is_whole:
            return self._is("label", f"{self._distinct} classes")
        if self._has_identifier_name or (self._is_integer and is_different):
            return self._skipped("row identifiers (numbers)")
        if len(self._distinct.values) < 2 and self.rows - self.nulls > 1:
            return self._skipped("the same number in every row")
        return self._is("binary" if self._is_boolean else "vector", "single values")


class _Strings(_Observer):
    """Texts, class names, identifiers, the names of splits, or paths of pictures or sounds."""

    def __init__(self, column: str, read_file: ReadFile) -> None:
        super().__init__(column)
        self._distinct = _Distinct()
        self._lengths = _TextLengths()
        self._files = _Files(column, read_file)
        self._has_paths = True
        self._nonblank = 0

    def _add(self, array: pa.Array) -> None:
        strings = [text for value in array.to_pylist() if value is not None and (text := value.strip())]
        self._nonblank += len(strings)
        self._distinct.add(strings)
        self._has_paths = self._has_paths and all(_is_file_path(text) for text in strings)
        self._lengths.add(strings)
        if self._has_paths:
            self._files.add(pa.array(strings, pa.string()))
            self.is_clear = self._files.is_clear

    def _schema(self) -> ColumnSchema:
        distinct = self._distinct.values
        if self._has_paths and self._nonblank:
            return replace(self._files.schema(), nulls=self.nulls)
        if {TRAIN_NAME} < distinct <= _SPLIT_NAMES:
            return self._is("split", f"values {', '.join(sorted(distinct))}")
        if reason := self._reason_to_skip():
            return self._skipped(reason)
        if self._lengths.mean_words < 3 and len(distinct) <= min(MAX_CLASSES, self._nonblank / 3):
            schema = self._is("label" if self._has_label_name else "categorical", f"{len(distinct)} classes")
            return replace(schema, nulls=self.rows - self._nonblank)
        schema = self._is("text", self._lengths.note, self._lengths.fields)
        return replace(schema, suits_encoder=self._lengths.are_sentences)

    def _reason_to_skip(self) -> str:
        distinct, reason = self._distinct.values, ""
        if distinct and distinct <= _SPLIT_NAMES and (TRAIN_NAME in distinct or self.column.lower() in _SPLIT_COLUMNS):
            missing = "test" if TRAIN_NAME in distinct else TRAIN_NAME
            values = " or ".join(sorted(distinct))
            reason = f"a split without {missing} rows (each row says {values}): rows are held out instead"
        elif self._has_identifier_name:
            reason = "row identifiers"
        elif not self._nonblank:
            reason = "blank in every row"
        elif len(distinct) == 1 and self._nonblank > 1:
            reason = "the same text in every row"
        elif self._lengths.mean_words < 2 and not self._distinct.repeats and self._nonblank > _MIN_IDENTIFIERS:
            reason = "row identifiers, all different"
        return reason


class _TextLengths:
    """Lengths of texts in words and characters."""

    def __init__(self) -> None:
        self._sampled = 0
        self._words = 0
        self._unspaced = 0  # of the words: single characters of scripts without spaces
        self._longest = {"word": 0, "character": 0}
        self._shortest = {"word": 1 << 30, "character": 1 << 30}

    def add(self, texts: Sequence[str]) -> None:
        for text in texts:
            # A text has at most as many tokens as characters, unless it has characters that stand for several.
            if self._sampled >= _MAX_SAMPLED_TEXTS and text.isascii() and len(text) <= self._longest["word"]:
                continue
            if self._sampled >= _MAX_SAMPLED_TEXTS and self._is_cut:
                continue
            prefix = text[: DEFAULT_LIMITS.text_characters]
            for unit in ("word", "character"):
                tokens = tokenize(prefix, unit, lowercase=True)
                length = len(tokens)
                self._longest[unit] = max(self._longest[unit], length)
                self._shortest[unit] = min(self._shortest[unit], length)
                if unit == "word" and self._sampled < _MAX_SAMPLED_TEXTS:
                    self._words += length
                    self._unspaced += sum(map(is_unspaced, tokens))
            self._sampled += self._sampled < _MAX_SAMPLED_TEXTS

    @property
    def is_empty(self) -> bool:
        return not self._sampled

    @property
    def mean_words(self) -> float:
        """An estimate in scripts without spaces between words, where each character is a token."""
        words = self._words - self._unspaced + self._unspaced / _CHARACTERS_PER_WORD
        return words / max(1, self._sampled)

    @property
    def are_sentences(self) -> bool:
        """Whether the texts have the length of titles and sentences."""
        return self.mean_words >= _MIN_SENTENCE_WORDS

    @property
    def _is_mostly_unspaced(self) -> bool:
        return self._unspaced > self._words / 2

    @property
    def _unit(self) -> tuple[Literal["word", "character"], int]:
        if self._words < 2 * self._sampled:
            return "character", MAX_CHARACTERS
        return "word", MAX_CHARACTERS if self._is_mostly_unspaced else MAX_WORDS

    @property
    def _is_cut(self) -> bool:
        unit, limit = self._unit
        return self._longest[unit] > limit

    @property
    def note(self) -> str:
        unit, _ = self._unit
        shortest, longest = self._shortest[unit], max(1, self._longest[unit])
        count = f"{shortest} to {longest}" if shortest < longest else f"{longest}"
        note = f"texts of {count} {unit}{'s' if longest > 1 else ''}"
        is_character = unit == "word" and self._is_mostly_unspaced
        return f"{note} (in scripts without spaces each character is a word)" if is_character else note

    @property
    def fields(self) -> dict[str, Any]:
        unit, limit = self._unit
        fields: dict[str, Any] = {"unit": unit, "length": min(max(1, self._longest[unit]), limit)}
        return fields | ({"too_long": "cut"} if self._is_cut else {})


class _TextLists(_Observer):
    """Several texts per row."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self._lengths = _TextLengths()

    def _add(self, array: pa.Array) -> None:
        self._lengths.add([text for text in array.flatten().to_pylist() if text is not None and text.strip()])

    def _schema(self) -> ColumnSchema:
        if self._lengths.is_empty:
            return self._skipped("blank in every row")
        note = f"{self._lengths.note}, multiple per row, one is sampled each epoch"
        return replace(self._is("text", note, self._lengths.fields), suits_encoder=self._lengths.are_sentences)


class _NumberLists(_Observer):
    """Lists of numbers or truth values."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self._lengths: Counter[int] = Counter()
        self._complete: Counter[int] = Counter()
        """Number of lists by length, of those without a null or NaN."""
        self._is_binary = True

    def _add(self, array: pa.Array) -> None:
        lengths = array.value_lengths().drop_null().to_numpy()
        numbers = array.flatten().cast("float64", safe=False).to_numpy(zero_copy_only=False)  # nulls become NaN
        missing = np.bincount(np.repeat(np.arange(len(lengths)), lengths), np.isnan(numbers), len(lengths))
        self._lengths.update(lengths.tolist())
        self._complete.update(lengths[missing == 0].tolist())
        self._is_binary = self._is_binary and bool(np.isin(numbers[~np.isnan(numbers)], (0, 1)).all())

    def _schema(self) -> ColumnSchema:
        (size, count), total = self._lengths.most_common(1)[0], self._lengths.total()
        if size == 0 or count < total / 2:
            return self._skipped(f"lists of {len(self._lengths)} lengths")
        if not self._complete[size]:
            return self._skipped(f"lists of {size} numbers, each with a null or NaN")
        note = f"{size} numbers" + (f", {total - count} rows have a different length" if count < total else "")
        if incomplete := count - self._complete[size]:
            note += f", {incomplete} rows have a null or NaN in the list"
        if self._is_binary:
            return self._is("binary", note, {"attributes": [f"{self.column}_{n}" for n in range(size)]})
        return self._is("vector", note, {"size": size})


class _NestedImages(_Observer):
    """Pictures as nested lists of numbers."""

    def __init__(self, column: str, read_range: Callable[[], tuple[float, float] | None]) -> None:
        super().__init__(column)
        self._read_range = read_range
        self._shapes: Counter[tuple[int, ...]] = Counter()

    def _add(self, array: pa.Array) -> None:
        for value in array.drop_null().slice(0, _MAX_SAMPLED_VALUES - self._shapes.total()).to_pylist():
            self._shapes[_array_shape(value)] += 1
        self.is_clear = self._shapes.total() >= _MAX_SAMPLED_VALUES

    def _schema(self) -> ColumnSchema:
        (shape, count), sampled = self._shapes.most_common(1)[0], self._shapes.total()
        layout = codec_columns.array_layout(shape)
        is_plane = len(shape) == 2
        if layout is None or layout[0][0] > _MAX_CHANNELS or (is_plane and min(shape) < _MIN_PLANE_SIDE):
            return self._skipped("nested lists that are not pictures: channels x height x width, or height x width x channels")
        low, high = self._read_range() or (0.0, 0.0)
        white = codec_columns.white_level((low, high))
        if low < 0 or high > max(white, codec_columns.MAX_UNIT_VALUE):
            return self._skipped(
                f"nested lists of numbers from {low:g} to {high:g}: pictures have numbers in [0, 1], or from 0 (black) to 255 "
                "(white). Scale them to use them"
            )
        (channels, height, width), order = layout
        note = codec_columns.describe_lists(shape, order, white)
        note += f", {sampled - count} of {sampled} sampled values have another shape" if count < sampled else ""
        note += f", values above 1 (up to {high:g}) are not readable" if high > white else ""
        if channels in (1, 3) and max(height, width) > _MAX_NATIVE_SIDE:
            height = width = SIDE
        return self._is("image", note, {"channels": channels, "height": height, "width": width})


def _array_shape(value: object) -> tuple[int, ...]:
    try:
        return np.array(value, np.float32).shape
    except (TypeError, ValueError):  # lists of different lengths
        return ()


class _Files(_Observer):
    """Image or audio files as bytes, as ``{bytes, path}``, or as paths."""

    def __init__(self, column: str, read_file: ReadFile) -> None:
        super().__init__(column)
        self._read_file = read_file
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._is_grey = True
        self._sounds: list[tuple[int, float]] = []  # sample rate and seconds
        self._damaged = 0
        self._first_damaged: Any = None  # the value, or the error of a sound

    def _add(self, array: pa.Array) -> None:
        for value in _values(array):
            if self._sampled >= _MAX_SAMPLED_VALUES:
                break
            content = value if isinstance(value, str | bytes) else value.get("bytes") or value.get("path")
            if content is None:
                continue
            try:
                content = self._read_file(content) if isinstance(content, str) else content
                if audio.has_signature(content):
                    self._sounds.append(audio.read_header(content))
                    continue
                with Image.open(io.BytesIO(content)) as image:
                    self._sizes[image.height, image.width] += 1
                    self._is_grey = self._is_grey and image.mode in _GREY_MODES
            except (ImportError, CodecError) as error:
                self._first_damaged = self._first_damaged or error
                self._damaged += 1
            except Exception:  # Pillow raises many classes, and the path may be missing
                self._first_damaged = self._first_damaged or value
                self._damaged += 1
        self.is_clear = self._sampled >= _MAX_SAMPLED_VALUES

    @property
    def _sampled(self) -> int:
        return self._sizes.total() + len(self._sounds) + self._damaged

    def _why_damaged(self, modality: ImageModality | AudioModality) -> str:
        """Return the reason of the first damaged value in the words of ``check``."""
        if isinstance(self._first_damaged, Exception):
            return str(self._first_damaged)
        reader = codec_columns.ColumnReader(modality, (self.column,), read_file=self._read_file)
        (cell,) = reader.cells([pa.array([self._first_damaged])])
        return str(cell.error or "the header cannot be read")

    def _schema(self) -> ColumnSchema:
        if len(self._sounds) > self._sizes.total():
            return self._audio_schema()
        if not self._sizes:
            return self._skipped(f"not images or sounds: {self._why_damaged(_ANY_IMAGE)}" if self._damaged else "empty")
        (height, width), _ = self._sizes.most_common(1)[0]
        keep_size = len(self._sizes) == 1 and min(height, width) >= 2 and max(height, width) <= _MAX_NATIVE_SIDE
        fields = {
            "channels": 1 if self._is_grey else 3,
            "height": height if keep_size else SIDE,
            "width": width if keep_size else SIDE,
        }
        note = "images, " + (f"{len(self._sizes)} sizes" if len(self._sizes) > 1 else f"all {height} x {width}")
        is_natural = not self._is_grey and min(height, width) >= _MIN_NATURAL_SIDE
        return replace(self._is("image", note + self._note_damaged(_ANY_IMAGE), fields), suits_encoder=is_natural)

    def _audio_schema(self) -> ColumnSchema:
        rates, lengths = zip(*self._sounds, strict=True)
        (rate, _), longest = Counter(rates).most_common(1)[0], max(lengths)
        rate = min(max(rate, 2000), _MAX_RATE)
        seconds = float(np.clip(np.ceil(10 * np.percentile(lengths, _LONG, method="lower")) / 10, 0.5, _MAX_SECONDS))
        window = 1 << round(np.log2(0.064 * rate))  # 64 ms: resolves the harmonics of a voice
        fields = {"sample_rate": rate, "seconds": seconds, "window": window, "hop": window // 2, "mels": 32}
        hertz = " and ".join(map(str, sorted(set(rates))[:3]))
        note = f"sounds of {min(lengths):.2f} to {longest:.2f} s, sampled at {hertz} Hz"
        return self._is("audio", note + self._note_damaged(_ANY_SOUND), fields)

    def _note_damaged(self, modality: ImageModality | AudioModality) -> str:
        if not self._damaged:
            return ""
        reason = self._why_damaged(modality)
        return f", {self._damaged} of {self._sampled} sampled {modality.name}s are damaged (the first: {reason})"


class _Samples(_Files):
    """Decoded sounds as ``{array, sampling_rate}``."""

    def _add(self, array: pa.Array) -> None:
        for row in array.drop_null().slice(0, _MAX_SAMPLED_VALUES - self._sampled):
            samples, rate = row["array"], row["sampling_rate"].as_py()
            if samples.is_valid and rate and (length := _longest_axis(samples)):
                self._sounds.append((int(rate), length / rate))
            elif samples.is_valid or rate:
                self._first_damaged = CodecError("wrong_type", "no samples, or no rate")
                self._damaged += 1
        self.is_clear = self._sampled >= _MAX_SAMPLED_VALUES

    def _schema(self) -> ColumnSchema:
        return self._audio_schema() if self._sounds else self._skipped("decoded sounds without samples or without a rate")


def _longest_axis(samples: Any) -> int:
    """Return the number of samples in an Arrow list of them, or of lists for each channel."""
    channel = getattr(samples[0], "values", None) if len(samples) else None
    return max(len(samples), 0 if channel is None else len(channel))


def _is_file_path(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES + AUDIO_SUFFIXES) and "://" not in text and len(text) < 1000


def _values(array: pa.Array) -> Iterator[Any]:
    """Iterate over the values that are not null, a few at a time: they may be large."""
    for start in range(0, len(array), 16):
        yield from (value for value in array.slice(start, 16).to_pylist() if value is not None)
