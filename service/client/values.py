"""Python values as the JSON values that the service accepts.

Pillow, pandas and PyTorch are never imported to look at a value: their objects are recognised by their attributes. Pillow is
imported to write a picture.
"""

import base64
import io
import math
import os
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_OPAQUE_OR_NOT = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
"""Modes with transparency that PNG has not, and the mode to convert them to. Others become RGB."""
_PIXELS = (
    "a picture has the shape (height, width), (height, width, channels) or (channels, height, width), and is bool, uint8 (0 to "
    "255), uint16 (0 to 65535) or float (0 to 1): convert it first. A vector has one axis"
)
_SAMPLES = (
    "a sound has the shape (samples,) or (samples, channels), and is int16 or float (-1 to 1); its sample rate is a positive "
    "number of Hz"
)
_VALUES = (
    "None, a string, number, list or dict, a path, the bytes of a file, a Pillow image, a pair of samples and sample rate, or "
    "anything that NumPy can convert to an array"
)


def to_json(value: object, place: str) -> Any:
    """The JSON value of a modality.

    A path becomes the file's content, pictures become PNG and sounds become WAV, all in base64. A picture whose channels PNG
    cannot hold becomes raw float32. A sound is a pair of samples and sample rate, or ``{array, sampling_rate}``. None, NaN and
    pandas' NA and NaT become None: the modality is absent.

    Args:
        place: JSON pointer to the value in the request's body, for error messages.

    Raises:
        OSError: a path cannot be read.
        ValueError: an array is neither a picture nor a sound, a Pillow image is not a picture, or a number is not finite.
        TypeError: a value of another type.
    """
    if isinstance(value, Mapping) and value and value.keys() <= {"bytes", "path"}:  # a file in Hugging Face's data sets
        content, path = value.get("bytes"), value.get("path")
        value = Path(path) if content is None and path else content
    if _is_missing(value):
        return None
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys():  # a sound in Hugging Face's data sets
        value = (value["array"], value["sampling_rate"])
    if isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "__array__") and _is_whole(value[1]):
        return _sound(_as_array(value[0], place), int(value[1]), place)
    if isinstance(value, os.PathLike):
        value = _content(value, place)
    if hasattr(value, "convert") and hasattr(value, "save"):
        return _pillow_picture(value, place)
    array = _as_array(value, place)
    if array is not None and array.ndim > 1:
        return _picture(array, place, "an array")
    return plain(value if array is None else array, place)


def plain(value: object, place: str) -> Any:
    """A value in JSON's own types. Arrays of any shape become lists. Raises as ``to_json``."""
    if value is None or isinstance(value, int | float | str):
        _check_scalar(value, place)
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {_name(key, place): plain(one, f"{place}/{escape(key)}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{place}/{index}") for index, one in enumerate(value)]
    array = _as_array(value, place)
    if array is not None:
        return _numbers(array, place)
    if hasattr(value, "__float__"):  # decimals and fractions
        return plain(float(value), place)
    raise TypeError(f"{place}: received {reprlib.repr(value)} of type {type(value).__name__}; a value is {_VALUES}")


def escape(name: object) -> str:
    """A name as a part of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def _is_missing(value: object) -> bool:
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return value is None or type(value).__name__ in {"NAType", "NaTType"}


def _content(path: os.PathLike[str], place: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:  # the same subclass, with the place
        raise OSError(error.errno, f"{place}: {error.strerror}", error.filename) from error


def _name(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{place}: names must be strings; received {reprlib.repr(key)} of type {type(key).__name__}")
    return key


def _check_scalar(value: float | str | None, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: received {value}; a number must be finite")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {reprlib.repr(value)} holds half a surrogate pair, which is no text") from error


def _as_array(value: Any, place: str) -> NDArray[Any] | None:
    """The value as an array; None if it does not offer to be one."""
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        return None
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{place}: received an array with masked values; fill them first")
    try:
        if hasattr(value, "detach") and hasattr(value, "cpu"):  # a PyTorch tensor, which may need gradients or be on a GPU
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
        return np.asarray(value)
    except Exception as error:  # each library raises its own
        raise TypeError(f"{place}: {type(value).__name__} cannot be converted to an array: {error}") from error


def _numbers(array: NDArray[Any], place: str) -> Any:
    if array.dtype.kind in "biu":
        return array.tolist()
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            index = "".join(f"/{i}" for i in np.argwhere(~finite)[0])
            raise ValueError(f"{place}{index}: received {array[~finite][0]}; a number must be finite")
        return array.astype(np.float64).tolist()
    if array.dtype.kind in "UT" or (array.dtype.kind == "O" and array.ndim):
        return plain(array.tolist(), place)
    raise TypeError(f"{place}: received values of type {array.dtype}; a value is {_VALUES}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _sound(array: NDArray[Any] | None, rate: int, place: str) -> str:
    """A WAV file in base64, with samples of 16 bits or float32."""
    assert array is not None
    is_float = array.dtype.kind == "f"
    received = f"samples of shape {array.shape} and {array.dtype}, {rate} Hz"
    is_sound = array.ndim in (1, 2) and array.size and (array.ndim == 1 or array.shape[1] <= array.shape[0])
    if not is_sound or not (is_float or array.dtype == np.int16) or not 0 < rate < 1 << 32:
        raise ValueError(f"{place}: received {received}, which is not a sound: {_SAMPLES}")
    if is_float and not bool(np.isfinite(array).all()):
        raise ValueError(f"{place}: received {received}, some of them not finite, which is not a sound: {_SAMPLES}")
    samples = array.astype("<f4" if is_float else "<i2")
    channels, width = (1 if array.ndim == 1 else array.shape[1]), samples.itemsize
    content = samples.tobytes()
    head = struct.pack("<HHIIHH", 3 if is_float else 1, channels, rate, rate * channels * width, channels * width, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(content)) + content
    return base64.b64encode(b"RIFF" + struct.pack("<I", len(body)) + body).decode()


def _pillow_picture(image: Any, place: str) -> Any:
    from PIL import ImageOps  # noqa: PLC0415 - needed only to send pictures

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":  # more than 8 bits: Pillow clips what does not fit
            array = np.asarray(upright)
        else:
            mode = upright.mode
            return _png(upright if mode in _PNG_MODES else upright.convert(_OPAQUE_OR_NOT.get(mode, "RGB")))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ValueError(f"{place}: the Pillow image of mode {image.mode} cannot be sent: {error}") from error
    return _picture(array, place, f"a Pillow image of mode {upright.mode}")


def _picture(array: NDArray[Any], place: str, source: str) -> Any:
    """PNG in base64 of one or three channels, or four in the last axis; raw float32 of other numbers of channels."""
    white = _white_level(array.dtype)
    received = f"{source} of shape {array.shape} and {array.dtype}"
    if white is None or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"{place}: received {received}, which is not a picture: {_PIXELS}")
    if array.dtype.kind == "f" and not bool(np.all((array >= 0) & (array <= 1))):
        raise ValueError(f"{place}: received {received} from {array.min()} to {array.max()}, which is not a picture: {_PIXELS}")
    if array.ndim == 3 and not _is_channels_last(array.shape):
        if array.shape[0] not in (1, 3):
            data = base64.b64encode((array / white).astype("<f4").tobytes()).decode()
            return {"data": data, "shape": list(array.shape), "dtype": "float32"}
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    levels = array if array.dtype == np.uint8 else np.rint(array.astype(np.float64) * (255 / white)).astype(np.uint8)
    from PIL import Image  # noqa: PLC0415

    return _png(Image.fromarray(np.ascontiguousarray(levels)))


def _white_level(dtype: np.dtype[Any]) -> float | None:
    """The number that stands for white; None if the type has no range that everyone agrees on."""
    if dtype.kind in "bf":
        return 1.0
    return float(np.iinfo(dtype).max) if dtype.kind == "u" and dtype.itemsize <= 2 else None


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the last of three axes is the channels: it has 1, 3 or 4 entries. If the first one does too, the order is taken
    whose picture is nearer to a square. The same rule as for pictures in training data."""
    first, *middle, last = shape

    def slimness(height: int, width: int) -> float:
        return max(height, width) / min(height, width)

    return last in (1, 3, 4) and (first not in (1, 3, 4) or slimness(first, middle[0]) < slimness(middle[0], last))


def _png(image: "Image.Image") -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
