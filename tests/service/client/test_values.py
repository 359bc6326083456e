"""Python values in their JSON form: nothing is clipped or lost silently, and what cannot be sent is rejected with its place."""

import base64
import fractions
import io
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from concord.client.requests import body
from concord.client.values import to_json
from tests.support.images import to_base64

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
WORDS = (GREY.astype(np.uint16) << 8) + PIXELS[..., 1]
PLACE = "/inputs/2/photo"


class Wrapped:
    """A value of another array library: it offers ``__array__`` and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __repr__(self) -> str:
        return f"Wrapped({self.array!r})"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class OnAnotherDevice:
    """An array that its library does not copy to the CPU."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")


def sent(value: object) -> Any:
    """The value as it stands in the request's body."""
    return orjson.loads(body([{}, {}, {"photo": value}], {}))["inputs"][2]["photo"]


def sent_pixels(value: object) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sent(value)))))


@pytest.mark.parametrize("value", ["seven", "sept œufs", "data:image/png;base64,AAAA", [0.5, 1], {"smile": True}, {"a": [{}]}])
def test_json_values_are_sent_unchanged(value: object) -> None:
    assert sent(value) == value


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_and_paths_are_sent_as_files(tmp_path: Path, wrap: Any) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and so on")
    expected = to_base64(b"\x89PNG and so on")
    assert sent(tmp_path / "a.png") == sent(wrap(b"\x89PNG and so on")) == expected
    assert sent({"bytes": b"\x89PNG and so on", "path": None}) == expected, "as in Hugging Face's data sets"
    assert sent({"bytes": None, "path": str(tmp_path / "a.png")}) == expected


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT, {"bytes": None, "path": None}],
    ids=repr,
)
def test_missing_values_are_sent_as_null(value: object) -> None:
    assert sent(value) is None


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS, PIXELS),
        (GREY, GREY),
        (PIXELS[..., :1], GREY),
        (PIXELS[:, ::-1], PIXELS[:, ::-1]),
        (PIXELS / 255, PIXELS),
        ((PIXELS / 255).astype(np.float16), PIXELS),
        ((PIXELS / 255).astype(np.longdouble), PIXELS),
        (PIXELS > 127, 255 * (PIXELS > 127)),
        (PIXELS.astype(np.uint16) * 257, PIXELS),
        (WORDS.astype(">u2"), np.rint(WORDS / 257)),
        (np.dstack([PIXELS, GREY]), np.dstack([PIXELS, GREY])),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (GREY[None], GREY),
        (PIXELS[:4, :4].transpose(2, 0, 1), PIXELS[:4, :4]),
    ],
    ids=lambda array: f"{array.dtype}-{'x'.join(map(str, array.shape))}",
)
@pytest.mark.parametrize("library", ["numpy", "torch", "other"])
def test_array_of_two_or_three_axes_is_sent_as_an_image(array: np.ndarray, expected: np.ndarray, library: str) -> None:
    if library == "torch" and (array.dtype.itemsize > 8 or array.dtype.byteorder == ">"):
        pytest.skip("PyTorch has no such type")
    value = {"numpy": lambda: array, "torch": lambda: torch.tensor(array.copy()), "other": lambda: Wrapped(array)}[library]()
    np.testing.assert_array_equal(sent_pixels(value), expected)


@given(arrays(st.sampled_from([np.float32, np.float64]), array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(
    -0.5, 1.5, width=32)))  # fmt: skip
def test_floats_are_rounded_to_the_nearest_level_or_rejected(array: np.ndarray) -> None:
    if array.min() < 0 or array.max() > 1:
        with pytest.raises(ValueError, match="not a picture"):
            sent(array)
    else:
        np.testing.assert_allclose(sent_pixels(array) / 255, array, atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("kind", [np.float32, np.uint8, np.uint16, np.bool_])
def test_picture_of_other_channels_is_sent_as_raw_floats(kind: type[np.generic]) -> None:
    bands = np.random.default_rng(0).random((5, 6, 7))
    white = 1.0 if kind in (np.float32, np.bool_) else float(np.iinfo(kind).max)  # type: ignore[type-var]
    value = (bands * white).astype(kind)
    raw = sent(value)
    assert (raw["shape"], raw["dtype"]) == ([5, 6, 7], "float32")
    numbers = np.frombuffer(base64.b64decode(raw["data"]), "<f4").reshape(5, 6, 7)
    np.testing.assert_allclose(numbers, value.astype(np.float64) / white, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32([0.5, 2]), [0.5, 2.0]),
        (np.float16([0.5, 2]), [0.5, 2.0]),
        (np.longdouble([0.5, 2]), [0.5, 2.0]),
        (np.array([0, 1]), [0, 1]),
        (np.uint64([2**63]), [2**63]),
        (np.array([True, False]), [True, False]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([np.float32(0.5), np.int64(2), np.bool_(True), np.str_("a")], [0.5, 2, True, "a"]),
        ([np.array(0.5), torch.tensor(2), torch.tensor(0.25)], [0.5, 2, 0.25]),
        ({"smile": np.bool_(True), "bald": torch.tensor(False)}, {"smile": True, "bald": False}),
        ((1, 2), [1, 2]),
        (np.float32(0.5), 0.5),
        (np.array(7), 7),
        (np.str_("seven"), "seven"),
        (pandas.Series([0.5, 2]), [0.5, 2.0]),
        (pandas.Series([1, 2], dtype="Int64"), [1, 2]),
        (pandas.Series([True, False], index=["smile", "bald"]), [True, False]),
        (pandas.Index([1, 2]), [1, 2]),
        (torch.tensor([0.5, 2.0], requires_grad=True), [0.5, 2.0]),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), [0.5, 2.0]),
        (torch.tensor(3), 3),
        (Wrapped(np.float32([0.5])), [0.5]),
        (Decimal("1.5"), 1.5),
        ([fractions.Fraction(1, 4)], [0.25]),
    ],
    ids=repr,
)
def test_numbers_of_any_library_are_sent_as_json_numbers(value: object, expected: object) -> None:
    assert orjson.dumps(sent(value)) == orjson.dumps(expected)


@given(arrays(st.sampled_from(["f2", "f4", "f8", "i1", "i4", "u8", "?"]), st.integers(0, 5)))
def test_array_of_one_axis_is_sent_exactly_or_rejected(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        with pytest.raises(ValueError, match=rf"^{PLACE}/\d: received -?(nan|inf); a number must be finite"):
            sent(array)
    else:
        np.testing.assert_array_equal(np.array(sent(array), array.dtype), array)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.int64),
        PIXELS.astype(np.uint32),
        PIXELS.astype(np.float32),
        PIXELS.astype(np.complex64),
        np.full((4, 4), np.nan),
        np.full((4, 4), -0.1),
        np.full((4, 4), 1.001),
        np.zeros((2, 4, 4, 3)),
        np.zeros((0, 4), np.uint8),
        np.array([["a"]]),
        pandas.DataFrame({"a": [1, 2], "b": [3, 4]}),
    ],
    ids=lambda array: str(array.shape),
)
def test_other_arrays_raise_with_shape_and_place(array: Any) -> None:
    with pytest.raises(ValueError, match=f"^{PLACE}: received .*not a picture") as caught:
        sent(array)
    assert str(array.shape) in str(caught.value)


MODES_8_BIT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
CONVERTED_FROM = {"La": "LA", "PA": "P", "RGBa": "RGBA"}


@pytest.mark.parametrize("mode", MODES_8_BIT)
def test_pillow_image_of_8_bit_mode_is_sent_with_its_colours(mode: str) -> None:
    level = 255 if mode == "1" else 204  # in the palette of mode P
    image = Image.new("RGB", (5, 6), (level, level, level)).convert(CONVERTED_FROM.get(mode, "RGB"))
    image = Image.new("LAB", (5, 6), (level, 128, 128)) if mode == "LAB" else image.convert(mode)
    shown = Image.open(io.BytesIO(base64.b64decode(sent(image)))).convert("L")
    assert shown.size == (5, 6)
    np.testing.assert_allclose(np.asarray(shown), level, atol=8 if mode == "LAB" else 2)  # L* is not linear in RGB


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparency_of_pillow_image_is_kept(mode: str) -> None:
    image = Image.fromarray(np.dstack([PIXELS, GREY])).convert("RGBA" if mode == "PA" else mode)
    if mode == "PA":
        image = Image.merge("PA", (Image.fromarray(PIXELS).convert("P"), Image.fromarray(GREY)))
    np.testing.assert_array_equal(sent_pixels(image)[..., -1], GREY)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F"])
def test_pillow_image_of_more_than_8_bits_is_scaled(mode: str) -> None:
    image = Image.fromarray(np.float32(WORDS / 65535)) if mode == "F" else Image.frombytes(
        mode, (5, 6), WORDS.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    )  # fmt: skip
    np.testing.assert_array_equal(sent_pixels(image), np.rint(WORDS / 257))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_image_of_unknown_range_raises_with_mode_and_place(mode: str) -> None:
    image = Image.fromarray(WORDS.astype(np.int32) if mode == "I" else WORDS.astype(np.float32))
    assert image.mode == mode
    with pytest.raises(ValueError, match=f"^{PLACE}: received a Pillow image of mode {mode} .*not a picture.*convert it first"):
        sent(image)


def test_rotated_image_is_sent_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(sent_pixels(Image.open(file)), np.rot90(PIXELS, -1))


def test_truncated_pillow_image_raises_with_its_place() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:2000]))
    with pytest.raises(ValueError, match=f"^{PLACE}: the Pillow image of mode L cannot be sent"):
        sent(image)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (object(), TypeError, f"^{PLACE}: received <object .* of type object; a value is None, a string"),
        ({1, 2}, TypeError, f"^{PLACE}: received .* of type set"),
        ([1, object()], TypeError, f"^{PLACE}/1: received"),
        ({"a/b": {1}}, TypeError, f"^{PLACE}/a~1b: received"),
        ({1: 2}, TypeError, f"^{PLACE}: names must be strings; received 1 of type int"),
        (np.datetime64("2020-01-01"), TypeError, f"^{PLACE}: received values of type datetime64"),
        (pandas.Timestamp(0), TypeError, f"^{PLACE}: received Timestamp"),
        (np.float32, TypeError, f"^{PLACE}: "),
        (OnAnotherDevice(), TypeError, f"^{PLACE}: OnAnotherDevice cannot be converted to an array: implicit conversion"),
        (torch.zeros(2).to_sparse(), TypeError, f"^{PLACE}: Tensor cannot be converted to an array"),
        (float("inf"), ValueError, f"^{PLACE}: received inf; a number must be finite"),
        ([0.5, float("nan")], ValueError, f"^{PLACE}/1: received nan; a number must be finite"),
        (torch.tensor([0.5, float("inf")]), ValueError, f"^{PLACE}/1: received inf"),
        (np.ma.masked_array([1, 2], [False, True]), ValueError, f"^{PLACE}: received an array with masked values"),
        ("\ud800", ValueError, f"^{PLACE}: .* surrogate"),
        (Path("/nowhere.png"), FileNotFoundError, f"{PLACE}: No such file or directory: '/nowhere.png'"),
    ],
)
def test_value_that_cannot_be_sent_raises_with_its_place(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sent(value)


def test_values_are_converted_without_importing_their_libraries() -> None:
    script = (
        "import sys, numpy; from concord.client.requests import body; "
        "body([{'a': numpy.ones(3), 'b': float('nan'), 'c': 'd', 'e': [numpy.float32(1)], 'f': b'g'}], {}); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not {"PIL", "pandas", "torch"} & set(loaded.split())


def test_to_json_names_modalities_with_their_pointer() -> None:
    with pytest.raises(TypeError, match=r"^/inputs/0/a~0b: received"):
        body({"a~b": object()}, {})
    with pytest.raises(ValueError, match=r"^/x: received inf"):
        to_json(float("inf"), "/x")
