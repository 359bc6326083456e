"""Wire value <-> array, per kind: the one preprocessing that both training and serving use.

Images
    PNG, JPEG and WebP, recognised by their first bytes; a declared media type is believed only to refuse what is not taken.
    The first frame of an animation counts, EXIF orientation is applied, 16-bit greys are scaled to 8 bits, CMYK becomes RGB,
    and transparent pixels show ``modality.background``. The aspect is kept: the largest centred box of the modality's aspect is
    resized (bicubic, antialiased). A picture of the right size and mode passes through untouched, divided by 255. Files have 1
    or 3 channels; a modality of other channels takes its array as raw numbers.
Text
    ``model.text`` has the rules.
Vectors
    Numbers as measured, finite and within 1e9 standard deviations; ``modality.mean`` and ``std`` standardise them on the way in
    and are undone on the way out.
Binary
    0, 1, true or false for each attribute, as a list in the modality's order or as an object that names every attribute.
Categorical
    The name of a class, exactly as the modality has it.

Base64 may use the standard or the URL-safe alphabet, leave out its padding and hold ASCII white space.
"""

import base64
import math
import reprlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import orjson
from jaxtyping import Float32, Float64, Int64, Shaped
from numpy.typing import NDArray

from model.image import array_from_file, array_from_image, file_from_array
from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from model.text import text_from_array, tokens_from_text
from model.wire import DEFAULT_LIMITS, Code, CodecError, Limits, from_base64, kind, refuse_fields, to_base64

__all__ = ["Code", "CodecError", "Limits", "array_from_image", "decode", "decode_bytes", "encode"]

ImageFormat = Literal["png", "webp", "raw"]
VectorFormat = Literal["float", "base64"]
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
_UNDECLARED = frozenset({"", "application/octet-stream"})
_NOT_JSON: dict[str, Code] = {"image": "bad_image", "vector": "bad_vector", "binary": "bad_attributes"}
_SHOWN = 20  # classes named in a refusal
_MOST_DEVIATIONS = 1e9  # of a vector's numbers: far beyond any measurement, and networks do not overflow yet


def decode(modality: Modality, value: object, limits: Limits = DEFAULT_LIMITS) -> Shaped[np.ndarray, "..."]:
    """The array of one row from a value as it stands in JSON.

    Args:
        value: image: base64, a data URL or ``{"data": base64, "media_type": ...}``, with other than 1 or 3 channels
            ``{"data": base64, "shape": [channels, height, width], "dtype": "float32"}`` (little-endian); text: a string;
            vector: a list of numbers or ``{"data": base64, "dtype": "float32"}``; binary: a list of 0 and 1 or an object of
            booleans; categorical: the class's name.

    Returns:
        an array that ``check_array`` accepts: (*modality.shape) of ``modality.dtype``.

    Raises:
        CodecError: the value is not one of the modality.
    """
    if isinstance(modality, ImageModality):
        return _image_from_wire(modality, value, limits)
    if isinstance(modality, TextModality):
        return tokens_from_text(modality, value, limits)
    if isinstance(modality, VectorModality):
        return _vector(modality, value)
    if isinstance(modality, CategoricalModality):
        return _class(modality, value)
    return _attributes(modality, value)


def decode_bytes(modality: Modality, content: bytes, limits: Limits = DEFAULT_LIMITS) -> Shaped[np.ndarray, "..."]:
    """The array of one row from a file's bytes: an image file, a text or a class in UTF-8, else the value's JSON.

    Raises:
        CodecError: as ``decode``.
    """
    if isinstance(modality, ImageModality) and modality.in_files:
        return array_from_file(modality, content, limits)
    if isinstance(modality, TextModality | CategoricalModality):
        try:
            return decode(modality, content.decode(), limits)
        except UnicodeDecodeError as error:
            refused: Code = "bad_text" if isinstance(modality, TextModality) else "bad_class"
            raise CodecError(refused, f"not UTF-8: byte {error.start} begins no character") from error
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise CodecError(_NOT_JSON[modality.kind], f"not JSON: {error}") from error
    return decode(modality, value, limits)


def encode(
    modality: Modality,
    array: Shaped[np.ndarray, "..."],
    *,
    image_format: ImageFormat = "png",
    vector_format: VectorFormat = "float",
) -> dict[str, Any]:
    """The wire value of what ``Runtime.decode`` returns for one row.

    Args:
        array: image (channels, height, width) in [0, 1]; text (length, token) log-probabilities; vector (size,),
            standardised; binary (size,) and categorical (class,) probabilities.
        image_format: ``png`` and ``webp`` are lossless in 8 bits; ``raw`` is the array itself, little-endian, in base64, and
            what is answered anyway where no file has so many channels.
        vector_format: a list of numbers, or little-endian float32 in base64.
    """
    if isinstance(modality, ImageModality):
        if image_format == "raw" or not modality.in_files:
            return {"data": to_base64(array), "shape": list(array.shape), "dtype": "float32"}
        data = base64.b64encode(file_from_array(array, image_format)).decode()
        return {"media_type": f"image/{image_format}", "data": data, "width": modality.width, "height": modality.height}
    if isinstance(modality, TextModality):
        return {"text": text_from_array(modality, array)}
    if isinstance(modality, CategoricalModality):
        probabilities = dict(zip(modality.classes, array.tolist(), strict=True))
        return {"class": modality.classes[int(array.argmax())], "data": probabilities}
    if isinstance(modality, VectorModality):
        mean, std = _statistics(modality)
        measured = (array * std + mean).astype(np.float32)
        return {"data": to_base64(measured), "dtype": "float32"} if vector_format == "base64" else {"data": measured.tolist()}
    return {"data": dict(zip(modality.attributes, array.tolist(), strict=True))}


def _image_from_wire(modality: ImageModality, value: object, limits: Limits) -> Float32[np.ndarray, "channels height width"]:
    pointer, declared = "", ""
    if not modality.in_files:
        return _image_from_numbers(modality, value)
    if isinstance(value, dict):
        refuse_fields(value, required=("data",), optional=("media_type",))
        declared = value["media_type"] if value.get("media_type") is not None else ""
        if not isinstance(declared, str):
            raise CodecError("wrong_type", "media_type must be a string", "/media_type")
        pointer, value = "/data", value["data"]
    if not isinstance(value, str):
        raise CodecError(
            "wrong_type",
            f"an image is base64, a data URL or an object with data and media_type; received {kind(value)}",
            pointer,
        )
    if not pointer and value[:5].lower() == "data:":
        header, comma, value = value[5:].partition(",")
        declared, *parameters = header.split(";")
        if not comma or "base64" not in (p.strip().lower() for p in parameters):
            raise CodecError("bad_base64", "a data URL must read data:<media type>;base64,<data>")
    _refuse_media_type(declared, "/media_type" if pointer else "")
    if value[:8].lower().startswith(("http://", "https://")):
        raise CodecError("bad_base64", "URLs are not fetched: send the image itself, in base64", pointer)
    content = from_base64(value, pointer, limits.image_bytes)
    try:
        return array_from_file(modality, content, limits)
    except CodecError as error:
        error.pointer = pointer
        raise


def _image_from_numbers(modality: ImageModality, value: object) -> Float32[np.ndarray, "channels height width"]:
    if not isinstance(value, dict):
        told = f"no file has {modality.channels} channels: send an object with data, shape and dtype; received {kind(value)}"
        raise CodecError("wrong_type", told)
    refuse_fields(value, required=("data", "shape", "dtype"))
    if value["dtype"] != "float32":
        raise CodecError("bad_image", f"dtype must be 'float32', received {reprlib.repr(value['dtype'])}", "/dtype")
    if value["shape"] != list(modality.shape):
        received = reprlib.repr(value["shape"])
        raise CodecError("bad_image", f"the shape must be {list(modality.shape)}, received {received}", "/shape")
    if not isinstance(value["data"], str):
        raise CodecError("wrong_type", f"data must be base64 in a string; received {kind(value['data'])}", "/data")
    content = from_base64(value["data"], "/data")
    size = 4 * math.prod(modality.shape)
    if len(content) != size:
        raise CodecError("bad_image", f"data has {len(content)} bytes, {size} are expected", "/data")
    array = np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(modality.shape)
    if not bool(np.all((array >= 0) & (array <= 1))):
        raise CodecError("bad_image", "values must be finite and within [0, 1]", "/data")
    return array


def _refuse_media_type(declared: str, pointer: str) -> None:
    media_type = declared.partition(";")[0].strip().lower()
    if media_type not in (*_UNDECLARED, *MEDIA_TYPES, "image/jpg"):
        raise CodecError(
            "unsupported_media_type",
            f"media type {reprlib.repr(media_type)} is not taken: send {', '.join(MEDIA_TYPES)}",
            pointer,
        )


def _class(modality: CategoricalModality, value: object) -> Int64[np.ndarray, " 1"]:
    if not isinstance(value, str):
        raise CodecError("wrong_type", f"a class is a string; received {kind(value)}")
    if value not in modality.class_ids:
        allowed = ", ".join(map(repr, modality.classes[:_SHOWN]))
        more = f" and {len(modality.classes) - _SHOWN} more" if len(modality.classes) > _SHOWN else ""
        raise CodecError("bad_class", f"received {reprlib.repr(value)}, the classes are {allowed}{more}")
    return np.array([modality.class_ids[value]], dtype=np.int64)


def _vector(modality: VectorModality, value: object) -> Float32[np.ndarray, " size"]:
    if isinstance(value, dict):
        refuse_fields(value, required=("data", "dtype"))
        if value["dtype"] != "float32":
            raise CodecError("bad_vector", f"dtype must be 'float32', received {reprlib.repr(value['dtype'])}", "/dtype")
        if not isinstance(value["data"], str):
            raise CodecError("wrong_type", f"data must be base64 in a string; received {kind(value['data'])}", "/data")
        content = from_base64(value["data"], "/data")
        if len(content) != 4 * modality.size:
            raise CodecError(
                "bad_vector", f"data has {len(content)} bytes, {modality.size} float32 take {4 * modality.size}", "/data"
            )
        numbers = np.frombuffer(content, dtype="<f4").astype(np.float64)
    else:
        numbers = np.array(_numbers(_listed(value, modality.size, "bad_vector", "a vector")), dtype=np.float64)
    mean, std = _statistics(modality)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        array: NDArray[np.float32] = ((numbers - mean) / std).astype(np.float32)
    taken = np.abs(array) <= _MOST_DEVIATIONS  # which no NaN is
    if not taken.all():
        index = int(np.argmin(taken))
        raise CodecError(
            "bad_vector",
            f"number {index} is not finite, or more than {_MOST_DEVIATIONS:g} standard deviations from the mean",
            f"/{index}" if isinstance(value, list) else "/data",
        )
    return array


def _statistics(modality: VectorModality) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
    mean = np.array(0.0 if modality.mean is None else modality.mean)
    return mean, np.array(1.0 if modality.std is None else modality.std)


def _numbers(values: Sequence[object]) -> list[float]:
    numbers = []
    for index, number in enumerate(values):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise CodecError("bad_vector", f"a vector holds numbers; received {kind(number)}", f"/{index}")
        try:
            numbers.append(float(number))
        except OverflowError as error:
            raise CodecError("bad_vector", f"number {index} is not finite in float32", f"/{index}") from error
    return numbers


def _attributes(modality: BinaryModality, value: object) -> Float32[np.ndarray, " size"]:
    if isinstance(value, dict):
        unknown, missing = sorted(set(value) - set(modality.attributes)), [a for a in modality.attributes if a not in value]
        if unknown or missing:
            raise CodecError(
                "bad_attributes",
                f"every attribute must be named: unknown {reprlib.repr(unknown)}, missing {reprlib.repr(missing)}",
            )
        answers = [value[attribute] for attribute in modality.attributes]
    else:
        answers = list(_listed(value, len(modality.attributes), "bad_attributes", "attributes"))
    for attribute, answer in zip(modality.attributes, answers, strict=True):
        if not isinstance(answer, int) or answer not in (0, 1):  # a bool is an int
            escaped = attribute.replace("~", "~0").replace("/", "~1")
            raise CodecError(
                "bad_attributes",
                f"{attribute} must be 0, 1, true or false; received {reprlib.repr(answer)}",
                f"/{escaped}" if isinstance(value, dict) else f"/{modality.attributes.index(attribute)}",
            )
    return np.array(answers, dtype=np.float32)


def _listed(value: object, size: int, code: Code, noun: str) -> list[object]:
    if not isinstance(value, list):
        raise CodecError("wrong_type", f"{noun} must be a list or an object; received {kind(value)}")
    if len(value) != size:
        raise CodecError(code, f"the list has {len(value)} entries, {size} are expected")
    return value
