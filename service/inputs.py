"""What the client sends: the options of a call, and values of Python turned into what JSON has."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import orjson
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Item = Mapping[str, Any]
"""A value for each modality that is there, and perhaps an ``id``."""

_OF_PNG = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})


class Refine(TypedDict, total=False):
    """As in the service's API."""

    steps: int
    tolerance: float
    budget_ms: float
    trace: bool


class CallOptions(TypedDict, total=False):
    """As in the service's API; and ``timeout``, in seconds, instead of the client's own."""

    model: str
    seed: int
    refine: Refine
    on_error: Literal["fail", "partial"]
    timeout: float


class EmbedOptions(CallOptions, total=False):
    representation: Literal["mean", "sample", "mean_log_var"]
    normalize: bool


class GenerateOptions(CallOptions, total=False):
    targets: Sequence[str]
    num_samples: int
    latent: Literal["sample", "mean"]
    temperature: float
    image: Literal["png", "webp", "raw"]
    return_embedding: bool


def body(inputs: Item | Sequence[Item], options: Mapping[str, Any]) -> bytes:
    """The JSON of a call.

    Raises:
        OSError: a path cannot be read.
        ValueError: an array that is no picture and no vector.
        TypeError: a value of another type.
    """
    items = [inputs] if isinstance(inputs, Mapping) else inputs
    wired = [{name: wire(value) for name, value in item.items()} for item in items]
    return orjson.dumps({"inputs": wired, **options})


def wire(value: object) -> Any:
    """A value as the service takes it. What JSON has stays as it is, strings too."""
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim == 1 else _png(_picture(value))
    if hasattr(value, "convert") and hasattr(value, "save"):  # a Pillow image, told without importing Pillow
        return _png(value)
    return value


def _picture(array: NDArray[Any]) -> "Image.Image":
    from PIL import Image  # noqa: PLC0415 - only who sends pictures needs it

    channels = array.shape[2] if array.ndim == 3 else 1
    kind = array.dtype.kind
    fits = array.ndim in (2, 3) and channels in (1, 3, 4) and array.size and (array.dtype == np.uint8 or kind in "bf")
    if not fits or (kind == "f" and not bool(np.all((array >= 0) & (array <= 1)))):
        raise ValueError(
            f"an array of shape {array.shape} and {array.dtype} is no picture: it takes (height, width) or (height, width, "
            "channels), with 1, 3 or 4 channels, of uint8 or of floats in [0, 1]"
        )
    levels = array if array.dtype == np.uint8 else np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if array.ndim == 3 and channels == 1 else levels)


def _png(image: Any) -> str:
    from PIL import ImageOps  # noqa: PLC0415

    upright = ImageOps.exif_transpose(image)
    file = io.BytesIO()
    (upright if upright.mode in _OF_PNG else upright.convert("RGB")).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
