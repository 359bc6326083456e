import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from service.inputs import body, wire

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def pixels(packed: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(packed))))


@pytest.mark.parametrize("value", ["seven", "data:image/png;base64,AAAA", [0.5, 1], {"smile": True}, {"data": "AAAA"}, None])
def test_what_json_has_stays_as_it_is(value: object) -> None:
    assert wire(value) is value


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_and_paths_are_files(tmp_path: Path, wrap: Any) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and so on")
    assert wire(tmp_path / "a.png") == wire(wrap(b"\x89PNG and so on")) == base64.b64encode(b"\x89PNG and so on").decode()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS[..., 0], PIXELS[..., 0]),
        (PIXELS[..., :1], PIXELS[..., 0]),
        (PIXELS[:, ::-1], PIXELS[:, ::-1]),
        (PIXELS / 255, PIXELS),
        ((PIXELS / 255).astype(np.float16), PIXELS),
        (PIXELS > 127, 255 * (PIXELS > 127)),
        (np.dstack([PIXELS, PIXELS[..., :1]]), np.dstack([PIXELS, PIXELS[..., :1]])),
    ],
)
def test_arrays_of_two_or_three_axes_are_pictures(array: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(pixels(wire(array)), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [(np.float32([0.5, 2]), [0.5, 2.0]), (np.array([0, 1]), [0, 1]), (np.array([True, False]), [True, False])],
)
def test_arrays_of_one_axis_are_lists(array: np.ndarray, expected: list[object]) -> None:
    assert orjson.dumps(wire(array)) == orjson.dumps(expected)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.float32),
        np.full((4, 4), np.nan),
        np.full((4, 4), -0.1),
        np.zeros((2, 4, 4, 3)),
        np.zeros((0, 4), np.uint8),
        np.array(7),
        np.array([["a"]]),
    ],
)
def test_other_arrays_are_refused_with_their_shape(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no picture") as caught:
        wire(array)
    assert str(array.shape) in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_pillow_images_of_any_mode(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert("L" if mode == "F" else "RGB").convert(mode)
    assert pixels(wire(image)).shape[:2] == (6, 5)


def test_a_picture_is_sent_upright() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(wire(Image.open(file))), np.rot90(PIXELS, -1))


def test_one_item_or_several_and_the_options_beside_them() -> None:
    assert orjson.loads(body({"word": "one", "id": "a"}, {"seed": 3})) == {"inputs": [{"word": "one", "id": "a"}], "seed": 3}
    assert orjson.loads(body(({"word": "one"}, {"word": "two"}), {})) == {"inputs": [{"word": "one"}, {"word": "two"}]}


def test_what_is_no_value_is_refused() -> None:
    with pytest.raises(TypeError):
        body({"word": object()}, {})
    with pytest.raises(FileNotFoundError):
        body({"photo": Path("/nowhere.png")}, {})
