"""Cells of Arrow columns -> arrays: any type of Arrow gives what the codec makes of the plain value."""

import base64
import decimal
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concord.model import codec
from concord.model.codec.columns import (
    Cell,
    ColumnReader,
    array_layout,
    class_names,
    number_range,
    read_from,
    stored_range,
    white_level,
    without_views,
)
from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from tests.support.arrow import columns
from tests.support.images import noise_image

VECTOR = VectorModality(name="v", size=2, mean=(1.0, 2.0), std=(2.0, 0.5))
NUMBER = VectorModality(name="n", size=1)
MARKS = BinaryModality(name="m", attributes=("new", "red"))
MARK = BinaryModality(name="m", attributes=("new",))
BRAND = CategoricalModality(name="b", classes=("acme", "zenith", "7", "7.5", "true", "false"))
WORDS = TextModality(name="t", length=3, unit="word", vocabulary=("a", "b"))
SHADE = ImageModality(name="s", channels=1, height=4, width=6)
PHOTO = ImageModality(name="p", channels=3, height=4, width=6)
SCAN = ImageModality(name="c", channels=2, height=4, width=6)
PNG = noise_image(1, (6, 4), "L")


def cells(modality: Modality, *arrays: pa.Array, **options: Any) -> list[Cell]:
    names = tuple(f"c{index}" for index in range(len(arrays)))
    return list(ColumnReader(modality, names, **options).cells([without_views(array) for array in arrays]))


def values(parsed: list[Cell]) -> list[Any]:
    """The first value of each cell, None where absent, or the error."""
    return [str(cell.error) if cell.error else cell.values[0].tolist() if cell.values else None for cell in parsed]


def parsed(modality: Modality, *plain: Any) -> list[Any]:
    return [None if value is None else codec.parse(modality, value).tolist() for value in plain]


NUMBER_TYPES = [pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.int64(), pa.uint16(), pa.uint64(), pa.decimal128(9, 3)]
LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)]


@pytest.mark.parametrize("make_list", LIST_TYPES, ids=["list", "large", "view", "large view", "fixed"])
@pytest.mark.parametrize("kind", NUMBER_TYPES, ids=str)
def test_vector_of_any_list_type_is_parsed(kind: Any, make_list: Any) -> None:
    rows: list[Any] = [[1, 2], None, [3, 4]]
    if kind == pa.decimal128(9, 3):
        rows = [row and [decimal.Decimal(number) for number in row] for row in rows]
    array = pa.array(rows, make_list(kind))
    assert values(cells(VECTOR, array)) == parsed(VECTOR, [1, 2], None, [3, 4])
    assert values(cells(VECTOR, array[1:])) == parsed(VECTOR, None, [3, 4])


@pytest.mark.parametrize("kind", [*NUMBER_TYPES, pa.bool_()], ids=str)
def test_single_number_of_any_type_is_a_vector_of_one(kind: Any) -> None:
    array = pa.array([1, None, 0], pa.int8()).cast(kind)
    assert values(cells(NUMBER, array)) == [[1.0], None, [0.0]]
    assert values(cells(MARK, array)) == [[1.0], None, [0.0]]


@given(st.lists(st.none() | st.lists(st.none() | st.floats(width=32), min_size=1, max_size=3), max_size=12))
def test_vectors_equal_the_codec_row_by_row(rows: list[list[float | None] | None]) -> None:
    def expected(row: list[float | None] | None) -> Any:
        try:
            return None if row is None else codec.parse(VECTOR, row).tolist()
        except codec.CodecError as error:
            return str(error)

    array = pa.array(rows, pa.list_(pa.float32()))
    assert values(cells(VECTOR, array)) == [expected(row) for row in rows]
    valid = [row for row in rows if row is not None and len(row) == 2 and np.isfinite(np.array(row, float)).all()]
    numbers = ColumnReader(VECTOR, ("c",)).numbers([array])
    assert numbers.tolist() == valid


@given(st.lists(st.tuples(*[st.sampled_from([0, 1, None, 2, float("nan")])] * 2), max_size=8))
def test_several_columns_form_one_row_of_numbers(rows: list[tuple[float | None, ...]]) -> None:
    arrays = [pa.array([row[column] for row in rows], pa.float64(), from_pandas=False) for column in range(2)]
    for (one, other), vector, marks in zip(rows, values(cells(VECTOR, *arrays)), values(cells(MARKS, *arrays)), strict=True):
        missing = [number is None or math.isnan(number) for number in (one, other)]
        if all(missing):
            assert (vector, marks) == (None, None)
        elif any(missing):
            name = "c0" if missing[0] else "c1"
            assert vector == marks == f"{name} is null while its other columns have values"
        else:
            assert vector == codec.parse(VECTOR, [one, other]).tolist()
            assert marks == [one, other] if {one, other} <= {0, 1} else "must be 0, 1" in marks


@pytest.mark.parametrize(
    ("modality", "array", "expected"),
    [
        (MARKS, pa.array([[True, False], None]), [[1, 0], None]),
        (MARKS, pa.array([[1.0, 0.0]]), [[1, 0]]),
        (MARKS, pa.array([{"red": True, "new": False}, None]), [[0, 1], None]),
        (BRAND, pa.array(["zenith", " acme\n", " ", None, ""]), [[1], [0], None, None, None]),
        (BRAND, pa.array(["zenith", None]).dictionary_encode(), [[1], None]),
        (BRAND, pa.array(["zenith", None], pa.large_string()), [[1], None]),
        (BRAND, pa.array(["zenith", None], pa.string_view()), [[1], None]),
        (BRAND, pa.array([7, None], pa.uint8()), [[2], None]),
        (BRAND, pa.array([7.0, 7.5, None, float("nan")]), [[2], [3], None, None]),
        (BRAND, pa.array([True, False, None]), [[4], [5], None]),
        (BRAND, pa.array([b"zenith"]), [[1]]),
        (WORDS, pa.array(["a b", "", None]), [[2, 3, 0], None, None]),
        (WORDS, pa.array(["b", None]).dictionary_encode(), [[3, 0, 0], None]),
        (WORDS, pa.array([b"b"]), [[3, 0, 0]]),
        (
            WORDS,
            pa.array([["b", "a"], ["", "a"], [], [None], None], pa.large_list(pa.string())),
            [[3, 0, 0], [2, 0, 0], *[None] * 3],
        ),
        (WORDS, pa.array([["b"], None], pa.list_(pa.string_view())), [[3, 0, 0], None]),
    ],
)
def test_cell_of_any_form_is_parsed(modality: Modality, array: pa.Array, expected: list[Any]) -> None:
    assert values(cells(modality, array)) == expected


@given(column=columns(), modality=st.sampled_from([VECTOR, NUMBER, MARKS, MARK, BRAND, WORDS, SHADE, PHOTO, SCAN]))
def test_column_of_any_arrow_type_gives_a_value_or_an_error_in_every_row(column: pa.Array, modality: Modality) -> None:
    found = cells(modality, column)
    assert len(found) == len(column)
    for cell, value in zip(found, column, strict=True):
        assert not (cell.values and cell.error)
        assert value.is_valid or (not cell.values and cell.error is None)
        for array in cell.values:
            assert array.shape == modality.shape
            assert np.isfinite(array).all()
    list(ColumnReader(modality, ("c",)).names([without_views(column)]))


@pytest.mark.parametrize("modality", [VECTOR, MARKS, BRAND, WORDS, SHADE])
def test_map_is_no_value_of_any_modality(modality: Modality) -> None:
    array = pa.array([[("a", 1.0)], None, [("new", 1.0), ("red", 0.0)]], pa.map_(pa.string(), pa.float64()))
    found = cells(modality, array)
    assert [bool(cell.error) for cell in found] == [True, False, True]
    assert not any(cell.values for cell in found)


def test_class_numbers_have_the_names_of_the_column() -> None:
    names = ("zenith", "other", "acme")
    numbers = pa.array([2, 0, -1, None, 1, 3, -2])
    found = cells(BRAND, numbers, class_names=names)
    assert values(found)[:4] == [[0], [1], None, None]
    assert found[4].unknown_class == "other"
    assert "class number 3: the column's classes have the numbers 0 to 2" in str(found[5].error)
    assert [cell.unknown_class for cell in found[5:]] == [None, None]
    assert values(cells(BRAND, numbers.cast(pa.float64()), class_names=names)) == values(found)
    words = TextModality(name="t", length=1, unit="word", vocabulary=("zenith", "acme"))
    assert values(cells(words, numbers[:3], class_names=names)) == [[3], [2], None]


def test_several_texts_are_all_values_or_the_first_one() -> None:
    array = pa.array([["a", " ", "b"], ["a", "a b a b"]])
    both = cells(WORDS, array)
    assert [value.tolist() for value in both[0].values] == [[2, 0, 0], [3, 0, 0]]
    assert "4 words, at most 3" in str(both[1].error)
    assert values(cells(WORDS, array, all_texts=False)) == [[2, 0, 0], [2, 0, 0]]


def test_names_are_texts_and_class_names_of_each_row() -> None:
    assert list(ColumnReader(WORDS, ("c",)).names([pa.array([["a", ""], None])])) == [["a"], []]
    classes = CategoricalModality(name="b")
    assert list(ColumnReader(classes, ("c",)).names([pa.array([1.0, float("nan"), 2.5])])) == [["1"], [], ["2.5"]]
    assert list(ColumnReader(classes, ("c",), ("x", "y")).names([pa.array([1, 5, -1])])) == [["y"], [], []]


@pytest.mark.parametrize("form", ["bytes", "struct", "base64", "path", "path in struct"])
def test_image_of_any_form_is_parsed(tmp_path: Path, form: str) -> None:
    (tmp_path / "写真 #1%.png").write_bytes(PNG)
    value: Any = {
        "bytes": PNG,
        "struct": {"bytes": PNG, "path": "elsewhere.png"},
        "base64": base64.b64encode(PNG).decode(),
        "path": "写真 #1%.png",
        "path in struct": {"bytes": None, "path": "写真 #1%.png"},
    }[form]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if isinstance(value, dict) else None
    absent = {"bytes": None, "path": None} if isinstance(value, dict) else None
    array = pa.array([value, None, absent], kind)
    found = values(cells(SHADE, array, read_file=read_from(tmp_path / "other", tmp_path)))
    assert found == [codec.parse_bytes(SHADE, PNG).tolist(), None, None]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no image", "not a PNG, JPEG or WebP image"),
        ("gone.png", "no such file: 'gone.png' in {folder}/a or {folder}/b"),
        ("/gone/gone.png", "no such file: '/gone/gone.png'"),
        ("a\0.png", "no such file"),
        ("https://example.org/a.png", "URLs are not fetched"),
        ("large.png", "large.png has 10485761 bytes, 10485760 are allowed"),
        (".", "no such file"),
        (3, "nested lists of numbers; received int"),
    ],
)
def test_image_that_cannot_be_read_says_why(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "large.png").open("wb") as file:
        file.truncate((10 << 20) + 1)
    (cell,) = cells(SHADE, pa.array([value]), read_file=read_from(tmp_path / "a", tmp_path / "b"))
    assert message.format(folder=tmp_path) in str(cell.error)


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3))


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(
    ("modality", "lists"),
    [
        (PHOTO, PIXELS.transpose(2, 0, 1)),
        (PHOTO, PIXELS),
        (SHADE, PIXELS[..., 0]),
        (SHADE, PIXELS[..., :1]),
        (SCAN, PIXELS[..., :2].transpose(2, 0, 1)),
        (SCAN, PIXELS[..., :2]),
        (SCAN, PIXELS[..., :2].transpose(2, 0, 1).ravel()),
    ],
    ids=["3 first", "3 last", "plane", "1 last", "2 first", "2 last", "flat"],
)
def test_nested_lists_of_any_layout_and_range_are_one_image(modality: ImageModality, lists: Any, scale: int) -> None:
    numbers = lists if scale == 255 else lists / 255
    array = pa.array([numbers.tolist(), None])
    (cell, absent) = cells(modality, array, white=white_level(number_range(array)))
    assert not absent.values
    np.testing.assert_allclose(cell.values[0], PIXELS[..., : modality.channels].transpose(2, 0, 1) / 255, atol=1e-7)
    assert cell.values[0].dtype == np.float32


def test_listed_image_of_another_size_is_scaled_like_a_file() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert values(cells(SHADE, pa.array([pixels.tolist()]), white=255.0)) == [
        codec.parse_bytes(SHADE, file.getvalue()).tolist()
    ]


@pytest.mark.parametrize(
    ("lists", "white", "message"),
    [
        ([[0.5, 1.0], [0.5]], 1.0, "nested lists of numbers of equal lengths"),
        ([[None, 1.0]], 1.0, "nested lists of numbers of equal lengths"),
        (np.zeros((2, 5, 6)).tolist(), 1.0, "must be [2, 4, 6] or [4, 6, 2], received [2, 5, 6]"),
        (np.full((2, 4, 6), -0.5).tolist(), 1.0, "within [0, 1], received -0.5 to -0.5. Scale"),
        (np.full((2, 4, 6), 300).tolist(), 255.0, "within [0, 255], received 300 to 300"),
        (np.full((2, 4, 6), np.nan).tolist(), 1.0, "must be finite"),
    ],
)
def test_nested_lists_that_are_no_image_are_rejected(lists: Any, white: float, message: str) -> None:
    (cell,) = cells(SCAN, pa.array([lists]), white=white)
    assert message in str(cell.error)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 32, 48), ((3, 32, 48), "channels x height x width")),
        ((32, 48, 3), ((3, 32, 48), "height x width x channels")),
        ((28, 28, 1), ((1, 28, 28), "height x width x channels")),
        ((16, 3, 4), ((4, 16, 3), "height x width x channels")),
        ((3, 4, 4), ((3, 4, 4), "channels x height x width")),
        ((4, 4, 3), ((3, 4, 4), "height x width x channels")),
        ((3, 3, 3), ((3, 3, 3), "channels x height x width")),
        ((7, 5, 6), ((7, 5, 6), "channels x height x width")),
        ((28, 30), ((1, 28, 30), "height x width")),
        ((2, 1, 6), None),
        ((5,), None),
    ],
)
def test_layout_of_nested_lists(shape: tuple[int, ...], expected: Any) -> None:
    assert array_layout(shape) == expected


@pytest.mark.parametrize(
    ("found", "white"), [(None, 1), ((0, 1), 1), ((0, 1.5), 1), ((0, 255), 255), ((0, 9), 255), ((-1, 9), 1), ((0, 999), 1)]
)
def test_white_level_follows_the_range_of_the_column(found: Any, white: float) -> None:
    assert white_level(found and (float(found[0]), float(found[1]))) == white


def test_stored_range_equals_range_of_the_values() -> None:
    table = pa.table({
        "x.y": pa.array([{"a": 1, "b": "z"}, None]),
        "x": pa.array([[[3.0, -1.5]], None]),
        "n": pa.array([None, None], pa.list_(pa.int8())),
        "s": ["a", "b"],
    })  # fmt: skip
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=1)
    parquet = pq.ParquetFile(file)
    assert stored_range(parquet, "x") == number_range(table["x"].combine_chunks()) == (-1.5, 3.0)
    assert stored_range(parquet, "n") is None
    assert stored_range(parquet, "s") is None
    file = io.BytesIO()
    pq.write_table(table, file, write_statistics=False)
    assert stored_range(pq.ParquetFile(file), "x") is None


def test_class_names_are_those_of_hugging_face() -> None:
    features = {"kind": {"names": ["a", "b"], "_type": "ClassLabel"}, "other": {"dtype": "int64", "_type": "Value"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    assert class_names(metadata, "kind") == ("a", "b")
    for damaged in (None, {}, {b"huggingface": b"{"}, {b"huggingface": b"[]"}, {b"huggingface": b'{"info": {"features": 1}}'}):
        assert class_names(damaged, "kind") is None
    assert class_names(metadata, "other") is class_names(metadata, "missing") is None
