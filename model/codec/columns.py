"""Cells of a table's columns -> arrays of a modality: the same rules for training and for bulk jobs.

A modality has one column, or several columns of single numbers. What a cell may hold, by kind:

=========== =========================================================================================================
kind        cell
=========== =========================================================================================================
image       the bytes of an image file; ``{bytes, path}`` as in Hugging Face's data sets; the path of an image file; base64 or
            a data URL; nested lists of numbers, channels first or last
audio       the bytes of an audio file; ``{bytes, path}``; the path of an audio file; base64 or a data URL; decoded samples,
            ``{array, sampling_rate}`` as in Hugging Face's data sets
text        a string; several strings; a class number
vector      a list of numbers, a single number, truth values as 0 and 1
binary      a list of 0, 1 and truth values; a single one; an object of them
categorical a class name; a class number; a whole number; a truth value
=========== =========================================================================================================

Null, NaN, a blank string, and ``{bytes, path}`` that are both null are an absent modality. In any other respect a cell is the
value of a request, see ``model.codec``. Numbers may be of any type: of floating point, integers, decimals.

Arrow arrays are used through their methods: the package does not depend on pyarrow.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray
from PIL import Image

from concord.model import codec
from concord.model.codec import audio
from concord.model.codec.errors import DEFAULT_LIMITS, CodecError, Limits
from concord.model.modality import (
    AudioModality,
    BinaryModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    is_picture,
)

ArrowArray = Any
"""A pyarrow.Array."""
UNKNOWN_CLASS = -1
"""Class number of a row whose class is unknown, as in Hugging Face's data sets."""
MAX_UNIT_VALUE = 2.0
"""Nested lists of numbers are in [0, 1] if none of the column exceeds this value. Otherwise 0 is black and 255 is white."""
CHANNELS_FIRST, CHANNELS_LAST = "channels x height x width", "height x width x channels"
PLANE, FLAT = "height x width", "channels x height x width in one list"
_NUMBERS = ("int", "uint", "halffloat", "float", "double", "bool", "decimal")


class Cell(NamedTuple):
    """What one row holds of a modality.

    Attributes:
        values: arrays (*modality.shape). Empty: the modality is absent. More than one only for several texts.
        blank: the row holds an empty text, which counts as absent.
        error: why the cell cannot be parsed. ``values`` is then empty.
        unknown_class: the class name in the cell, if the error is that the modality has no such class.
    """

    values: Sequence[NDArray[Any]] = ()
    blank: bool = False
    error: CodecError | None = None
    unknown_class: str | None = None


_ABSENT = Cell()
_BLANK = Cell(blank=True)


def read_from(*folders: Path) -> Callable[[str], bytes]:
    """Function that returns the content of a file. A relative path is looked up in each of the folders, in this order."""

    def read(path: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
        for folder in folders:
            file = folder / path
            if file.is_file():
                if (size := file.stat().st_size) > limits.file_bytes:
                    raise CodecError("too_large", f"{file} has {size} bytes, {limits.file_bytes} are allowed")
                return file.read_bytes()
        places = " or ".join(map(str, dict.fromkeys(folders)))
        raise FileNotFoundError(f"no such file: {path!r}" + ("" if Path(path).is_absolute() else f" in {places}"))

    return read


_READ_FILE = read_from(Path())


@dataclass(frozen=True)
class ColumnReader:
    """Parses the cells of one modality's columns.

    Attributes:
        columns: names of the columns, for messages.
        class_names: names of class numbers, in their order. None: the column holds no class numbers.
        white: value of a white pixel in nested lists of numbers: 1 or 255, see ``white_level``.
        read_file: returns the content of the image or audio file with a given path.
        all_texts: whether a cell of several texts has all of them as values. Otherwise it has the first one, or with a frozen
            encoder, all of them as one value.
        preprocessor: of the frozen encoder, if the modality has one. The cells hold its inputs.
    """

    modality: Modality
    columns: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    white: float = 1.0
    read_file: Callable[[str], bytes] = _READ_FILE
    all_texts: bool = True
    limits: Limits = DEFAULT_LIMITS
    preprocessor: codec.Preprocessor | None = None

    def cells(self, arrays: Sequence[ArrowArray]) -> Iterator[Cell]:
        """Iterate over the parsed cells.

        Args:
            arrays: one for each of ``columns``, all of the same length.
        """
        modality = self.modality
        if is_picture(modality) and _is_list(arrays[0]):
            yield from (self._parsed(self._listed_image, modality, row) for row in arrays[0])
        elif isinstance(modality, AudioModality) and holds_samples(arrays[0].type):
            yield from (self._parsed(self._samples, modality, row) for row in arrays[0])
        elif is_picture(modality) or isinstance(modality, AudioModality):
            yield from (self._parsed(self._file, modality, value) for value in arrays[0].to_pylist())
        elif isinstance(modality, VectorModality | BinaryModality) and not isinstance(modality, EncodedModality):
            yield from self._number_cells(modality, arrays)
        else:
            yield from (self._parsed(self._texts, modality, value) for value in arrays[0].to_pylist())

    def described(self, arrays: Sequence[ArrowArray]) -> str | None:
        """How the first picture in nested lists is read, in words. None if there is none."""
        if is_picture(self.modality) and _is_list(arrays[0]):
            for row in arrays[0]:
                pixels = _dense(row.values) if row.is_valid else None
                if pixels is not None and (order := _axis_order(self._picture, pixels.shape)):
                    return describe_lists(pixels.shape, order, self.white)
        return None

    def numbers(self, arrays: Sequence[ArrowArray]) -> Float64[np.ndarray, "valid size"]:
        """The measured numbers of a vector, without rows that are absent or cannot be parsed."""
        assert isinstance(self.modality, VectorModality)
        if isinstance(self.modality, EncodedModality):
            features = [value for cell in self.cells(arrays) for value in cell.values]
            return np.array(features, dtype=np.float64).reshape(len(features), self.modality.size)
        matrix, regular = _matrix(arrays, self.modality.size)
        valid: NDArray[np.float64] = matrix[regular & np.isfinite(matrix).all(axis=1)]
        return valid

    def names(self, arrays: Sequence[ArrowArray]) -> Iterator[list[str]]:
        """Iterate over the texts or the class names of each row. Empty where there is none, or where it cannot be read."""
        for value in arrays[0].to_pylist():
            try:
                yield [name for name in self._strings(value) if isinstance(name, str) and name.strip()]
            except CodecError:
                yield []

    def _parsed(self, parse: Callable[[Any, Any], Cell], modality: Modality, value: object) -> Cell:
        try:
            return parse(modality, value)
        except CodecError as error:
            return Cell(error=error)
        except OSError as error:
            return Cell(error=CodecError("bad_audio" if isinstance(modality, AudioModality) else "bad_image", str(error)))

    def _number_cells(self, modality: VectorModality | BinaryModality, arrays: Sequence[ArrowArray]) -> Iterator[Cell]:
        """Parse all regular rows at once, and the others one after the other."""
        matrix, regular = _matrix(arrays, modality.shape[0])
        if isinstance(modality, VectorModality):
            values = codec.standardise(modality, matrix)
            valid = regular & codec.within_range(values).all(axis=1)
        else:
            valid = regular & np.isin(matrix, (0, 1)).all(axis=1)
            values = np.where(valid[:, None], matrix, 0).astype(np.float32)
        for row, is_valid in enumerate(valid.tolist()):
            if is_valid:
                yield Cell((values[row],))
            else:
                cells = [_python(array[row]) for array in arrays]
                yield self._parsed(self._number_cell, modality, cells)

    def _number_cell(self, modality: VectorModality | BinaryModality, cells: Sequence[object]) -> Cell:
        if all(cell is None for cell in cells):
            return _ABSENT
        if len(cells) > 1 and None in cells:
            missing = [name for name, cell in zip(self.columns, cells, strict=True) if cell is None]
            raise CodecError("wrong_type", f"{', '.join(missing)} is null while its other columns have values")
        value = list(cells) if len(cells) > 1 else cells[0]
        if isinstance(value, bytes | str) and not value.strip():
            return _BLANK
        if isinstance(value, bytes):
            return Cell((codec.parse_bytes(modality, value, self.limits),))
        if isinstance(value, dict):
            return Cell((codec.parse(modality, value, self.limits),))
        numbers = [_plain_number(number) for number in (value if isinstance(value, list) else [value])]
        if isinstance(modality, BinaryModality):
            numbers = [int(n) if isinstance(n, float) and n in (0, 1) else n for n in numbers]
        return Cell((codec.parse(modality, numbers, self.limits),))

    def _parse(self, value: object) -> NDArray[Any]:
        """The array of a value, or of the bytes of a file."""
        parse = codec.parse_bytes if isinstance(value, bytes) else codec.parse
        return parse(self.modality, value, self.limits, self.preprocessor)  # type: ignore[arg-type]  # the type was checked

    @property
    def _picture(self) -> ImageModality:
        """What nested lists of numbers are read as."""
        if isinstance(self.modality, ImageModality):
            return self.modality
        assert self.preprocessor is not None
        frame = self.preprocessor.image
        return ImageModality(name=self.modality.name, channels=3, height=frame.height, width=frame.width)

    def _texts(self, modality: TextModality | CategoricalModality | EncodedModality, value: object) -> Cell:
        if isinstance(value, bytes):
            return Cell((self._parse(value),)) if value.strip() else _BLANK
        strings = self._strings(value)
        present = [string for string in strings if not (isinstance(string, str) and not string.strip())]
        if not present:
            return _BLANK if strings else _ABSENT
        if isinstance(modality, CategoricalModality):
            return self._class(modality, present[0])
        if isinstance(modality, EncodedModality) and not self.all_texts:
            return Cell((codec.joined([self._parse(string) for string in present]),))
        chosen = present if self.all_texts else present[:1]
        return Cell([self._parse(string) for string in chosen])

    def _class(self, modality: CategoricalModality, name: object) -> Cell:
        if isinstance(name, str) and name not in modality.class_ids:
            name = name.strip()
        try:
            return Cell((codec.parse(modality, name, self.limits),))
        except CodecError as error:
            return Cell(error=error, unknown_class=name if error.code == "bad_class" and isinstance(name, str) else None)

    def _strings(self, value: object) -> list[object]:
        """The texts or class names of a cell that are not null. Values of other types are returned as they are."""
        several = isinstance(value, list) and not isinstance(self.modality, CategoricalModality)
        named = [self._named(one) for one in (value if several and isinstance(value, list) else [value])]
        return [name for name in named if name is not None]

    def _named(self, value: object) -> object:
        """The class name of a number or of a truth value, None if it stands for an unknown class; other values unchanged."""
        is_class = isinstance(self.modality, CategoricalModality)
        if is_class and isinstance(value, bool):
            return "true" if value else "false"
        number = value if isinstance(value, bool) else _plain_number(value)
        if _is_nan(number):
            return None
        if isinstance(number, float) and number.is_integer():  # integers with a gap become floats in many tools
            number = int(number)
        if self.class_names and isinstance(number, int):
            return _class_name(number, self.class_names)
        return str(number) if is_class and isinstance(number, int | float) else value

    def _file(self, modality: Modality, value: object) -> Cell:
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            content, path = value.get("bytes"), value.get("path")
            value = path if content is None else content
        if value is None or _is_nan(value):
            return _ABSENT
        if isinstance(value, str) and not value.strip():
            return _BLANK
        if isinstance(value, bytes):
            return Cell((self._parse(value),))
        if isinstance(value, str) and _is_path(value):
            return Cell((self._parse(self.read_file(value)),))
        if isinstance(value, str | dict):
            return Cell((self._parse(value),))
        raise CodecError(
            "wrong_type",
            f"an {modality.kind} column holds {modality.kind} files as {{bytes, path}}, as bytes or as paths, or "
            + ("nested lists of numbers" if is_picture(modality) else "{array, sampling_rate}")
            + f"; received {type(value).__name__}",
        )

    def _samples(self, modality: AudioModality, row: Any) -> Cell:
        if not row.is_valid or not (row["array"].is_valid or row["sampling_rate"].is_valid):
            return _ABSENT
        samples = _dense(row["array"].values) if row["array"].is_valid else None
        if samples is None or not row["sampling_rate"].is_valid:
            raise CodecError(
                "wrong_type",
                "decoded samples are {array, sampling_rate}: a list of numbers, or one for each channel, and a rate in Hz",
            )
        return Cell((audio.array_from_waveform(modality, samples, int(row["sampling_rate"].as_py()), self.limits),))

    def _listed_image(self, _: Modality, row: Any) -> Cell:
        if not row.is_valid:
            return _ABSENT
        modality = self._picture
        pixels = _dense(row.values)
        if pixels is None:
            raise CodecError(
                "wrong_type",
                f"an image of {modality.channels} channels as lists must be nested lists of numbers of equal lengths",
            )
        channels_first = _channels_first(modality, pixels)
        if channels_first is None:
            layouts = [modality.shape, (*modality.shape[1:], modality.channels)]
            layouts += [modality.shape[1:]] if modality.channels == 1 else []
            allowed = " or ".join(str(list(layout)) for layout in dict.fromkeys(layouts))
            raise CodecError("bad_image", f"the shape must be {allowed}, received {list(pixels.shape)}")
        if not bool(np.all((channels_first >= 0) & (channels_first <= self.white))):  # a comparison with NaN is false
            low, high = channels_first.min(), channels_first.max()
            raise CodecError(
                "bad_image",
                f"values must be finite and within [0, {self.white:g}], received {low:g} to {high:g}. Scale the column to "
                "[0, 1], or to 0 for black and 255 for white",
            )
        if not modality.in_files:
            return Cell(((channels_first / self.white).astype(np.float32),))
        levels = np.rint(channels_first / self.white * 255).astype(np.uint8).transpose(1, 2, 0)
        image = Image.fromarray(levels[..., 0] if modality.channels == 1 else np.ascontiguousarray(levels))
        if isinstance(self.modality, EncodedModality):
            assert self.preprocessor is not None
            return Cell((codec.standardised(self.modality, self.preprocessor.pixels(image, self.limits)),))
        return Cell((codec.array_from_image(modality, image),))


def _class_name(number: int, names: Sequence[str]) -> str | None:
    if number == UNKNOWN_CLASS:
        return None
    if not 0 <= number < len(names):
        raise CodecError(
            "bad_class",
            f"class number {number}: the column's classes have the numbers 0 to {len(names) - 1}, and {UNKNOWN_CLASS} or null "
            "where unknown",
        )
    return names[number]


def class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Names of a column's class numbers, in their order, from the metadata of an Arrow schema. None: they are not stated.

    Hugging Face's ``datasets`` writes them for columns of the feature ``ClassLabel``.
    """
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def without_views(array: ArrowArray) -> ArrowArray:
    """An Arrow array of the same values without view types, dictionaries and extension types, which Arrow cannot select from or
    whose cells are no plain values."""
    plain = plain_type(array.type)
    if plain == array.type:
        return array
    while hasattr(array, "storage"):
        array = array.storage
    if "list_view" in str(array.type):  # Arrow 26 casts slices of them wrongly
        import pyarrow  # noqa: PLC0415 - not a dependency of the server

        return pyarrow.array(array.to_pylist(), plain)
    return array if array.type == plain else array.cast(plain)


def plain_type(kind: Any) -> Any:
    """The Arrow type of the same values without view types, dictionaries and extension types."""
    import pyarrow  # noqa: PLC0415 - not a dependency of the server

    types = pyarrow.types
    if hasattr(kind, "storage_type"):
        kind = plain_type(kind.storage_type)
    elif types.is_dictionary(kind):
        kind = plain_type(kind.value_type)
    elif types.is_string_view(kind):
        kind = pyarrow.string()
    elif types.is_binary_view(kind):
        kind = pyarrow.binary()
    elif types.is_fixed_size_list(kind):
        kind = pyarrow.list_(plain_type(kind.value_type), kind.list_size)
    elif types.is_large_list(kind) or types.is_large_list_view(kind):
        kind = pyarrow.large_list(plain_type(kind.value_type))
    elif types.is_list(kind) or types.is_list_view(kind):
        kind = pyarrow.list_(plain_type(kind.value_type))
    elif types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        kind = pyarrow.struct([field.with_type(plain_type(field.type)) for field in fields])
    return kind


def leaves(kind: Any) -> int:
    """Number of Parquet columns in which a value of an Arrow type is stored."""
    if hasattr(kind, "storage_type"):
        return leaves(kind.storage_type)
    return sum(leaves(kind.field(index).type) for index in range(kind.num_fields)) or 1


def stored_range(file: Any, column: str) -> tuple[float, float] | None:
    """Smallest and largest number of a column, from the statistics in a Parquet file.

    Args:
        file: a pyarrow.parquet.ParquetFile.

    Returns:
        None if the file has no statistics of the column, or none of its values is a number.
    """
    schema = file.schema_arrow
    index = schema.names.index(column)
    first = sum(leaves(schema.field(before).type) for before in range(index))
    lowest, highest = math.inf, -math.inf
    for group in range(file.metadata.num_row_groups):
        chunk = file.metadata.row_group(group).column(first)
        statistics = chunk.statistics
        if statistics is None or not statistics.has_min_max:
            if statistics is not None and statistics.has_null_count and statistics.null_count == chunk.num_values:
                continue
            return None
        if isinstance(statistics.min, bool) or not isinstance(statistics.min, int | float):
            return None
        lowest, highest = min(lowest, float(statistics.min)), max(highest, float(statistics.max))
    return (lowest, highest) if lowest <= highest else None


def number_range(array: ArrowArray) -> tuple[float, float] | None:
    """Smallest and largest number of nested lists. None if there is none."""
    array = without_views(array)
    while _is_list(array):
        array = array.flatten()
    numbers = _to_float64(array) if _is_number(array) else np.empty(0)
    numbers = numbers[np.isfinite(numbers)]
    return (float(numbers.min()), float(numbers.max())) if numbers.size else None


def holds_samples(kind: Any) -> bool:
    """Whether an Arrow type is that of decoded sounds: ``{array, sampling_rate}``, and other fields, which are not read."""
    names = {kind.field(index).name for index in range(kind.num_fields)} if str(kind).startswith("struct") else set()
    return {"array", "sampling_rate"} <= names


def white_level(value_range: tuple[float, float] | None) -> float:
    """Value of a white pixel in a column of nested lists, from the range of all its numbers: 255 if they lie between 0 and 255
    and one exceeds ``MAX_UNIT_VALUE``, else 1."""
    low, high = value_range or (0.0, 0.0)
    return 255.0 if low >= 0 and MAX_UNIT_VALUE < high <= 255 else 1.0


def array_layout(shape: Sequence[int]) -> tuple[tuple[int, int, int], str] | None:
    """Channels, height and width of a picture in nested lists, and the order of its axes in words.

    Two axes are height and width. Of three axes the last one is the channels if it has 1, 3 or 4 entries. If the first one has
    as many, the order is taken whose picture is nearer to a square. In all other cases the first axis is the channels.

    Returns:
        None if the lists are not a picture of at least 2 x 2 pixels.
    """
    if len(shape) == 2:
        size, order = (1, shape[0], shape[1]), PLANE
    elif len(shape) == 3:
        first, last = (shape[0], shape[1], shape[2]), (shape[2], shape[0], shape[1])
        is_last = shape[2] in (1, 3, 4) and (shape[0] not in (1, 3, 4) or _slimness(last) < _slimness(first))
        size, order = (last, CHANNELS_LAST) if is_last else (first, CHANNELS_FIRST)
    else:
        return None
    return (size, order) if min(size[1:]) >= 2 and size[0] >= 1 else None


def describe_lists(shape: Sequence[int], order: str, white: float) -> str:
    """How nested lists are read as pictures, in words.

    Args:
        shape: of the lists.
        order: of their axes, see ``array_layout``.
        white: see ``white_level``.
    """
    return f"lists of {' x '.join(map(str, shape))} numbers, read as {order}, from 0 (black) to {white:g} (white)"


def _slimness(size: tuple[int, int, int]) -> float:
    return max(size[1:]) / max(1, min(size[1:]))


def _axis_order(modality: ImageModality, shape: Sequence[int]) -> str | None:
    """The order of the axes of a picture, as in ``array_layout``. None if lists of this shape are no picture of the modality.

    A picture whose channels fit into an image file may have any size.
    """
    channels, layout = modality.channels, array_layout(shape)
    if tuple(shape) == modality.shape:
        return CHANNELS_FIRST
    if tuple(shape) == (*modality.shape[1:], channels):
        return CHANNELS_LAST
    is_plane = tuple(shape) == modality.shape[1:] and channels == 1
    if layout is not None and (is_plane or (modality.in_files and layout[0][0] == channels)):
        return layout[1]
    return FLAT if tuple(shape) == (math.prod(modality.shape),) else None


def _channels_first(modality: ImageModality, pixels: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The pixels as (channels, height, width). None if they are no picture of the modality."""
    match _axis_order(modality, pixels.shape):
        case None:
            return None
        case order if order == CHANNELS_LAST:
            return pixels.transpose(2, 0, 1)
        case order if order == FLAT:
            return pixels.reshape(modality.shape)
        case _:
            return pixels.reshape(-1, *pixels.shape[-2:])


def _dense(values: ArrowArray) -> NDArray[np.float64] | None:
    """The numbers of nested lists of equal lengths, without nulls, as an array. None if they are anything else."""
    if not _is_list(values):
        return _to_float64(values) if _is_number(values) and not values.null_count else None
    lengths = values.value_lengths().to_numpy(zero_copy_only=False)
    if values.null_count or (lengths != lengths[:1]).any():
        return None
    inner = _dense(values.flatten())
    if inner is None or not len(lengths):
        return inner
    return inner.reshape(len(values), int(lengths[0]), *inner.shape[1:])


def _matrix(arrays: Sequence[ArrowArray], size: int) -> tuple[Float64[np.ndarray, "row {size}"], Bool[np.ndarray, " row"]]:
    """The numbers of each row, and which rows are regular: they have ``size`` numbers, none of which is null or, in a column of
    single numbers, NaN. Other rows hold zeros."""
    rows = len(arrays[0])
    regular: NDArray[np.bool_] = np.zeros(rows, dtype=bool)
    matrix = np.zeros((rows, size))
    if all(_is_number(array) for array in arrays):
        if len(arrays) == size:
            numbers = np.stack([_to_float64(array) for array in arrays], axis=1)
            regular = ~np.isnan(numbers).any(axis=1)
            matrix[regular] = numbers[regular]
        return matrix, regular
    if len(arrays) != 1 or not _is_list(arrays[0]) or not _is_number(flat := arrays[0].flatten()):
        return matrix, regular
    lengths = np.nan_to_num(arrays[0].value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
    regular = lengths == size
    numbers = _to_float64(flat)
    starts = np.cumsum(lengths) - lengths
    if regular.all():
        matrix = numbers.reshape(rows, size)
    elif regular.any():
        matrix[regular] = numbers[starts[regular, None] + np.arange(size)]
    if flat.null_count:
        is_null = ~flat.is_valid().to_numpy(zero_copy_only=False)
        has_null: NDArray[np.bool_] = np.add.reduceat(np.append(is_null, False), starts).astype(bool) & (lengths > 0)
        regular = regular & ~has_null
    return matrix, regular


def _is_list(array: ArrowArray) -> bool:
    return hasattr(array, "value_lengths") and not hasattr(array, "keys")  # a map has both


def _is_number(array: ArrowArray) -> bool:
    return str(array.type).startswith(_NUMBERS)


def _to_float64(array: ArrowArray) -> Float64[np.ndarray, " number"]:
    """Null becomes NaN."""
    numbers: NDArray[np.float64] = array.cast("float64", safe=False).to_numpy(zero_copy_only=False)
    return numbers


def _python(scalar: Any) -> object:
    """The Python value of an Arrow scalar, None for NaN: many tools write an empty cell as NaN."""
    value = scalar.as_py()
    return None if _is_nan(value) else value


def _is_nan(value: object) -> bool:
    return isinstance(value, float | np.floating) and math.isnan(value)


def _plain_number(value: object) -> object:
    """An int or float for truth values, decimals and NumPy's numbers; other values unchanged."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float | str | bytes) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else value


def _is_path(value: str) -> bool:
    """Whether a string names an image or audio file. Base64 has no dots; data URLs and addresses are left to the codec."""
    return "." in value and not value[:8].lower().startswith(("data:", "http://", "https://"))
