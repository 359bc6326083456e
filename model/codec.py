"""Wire value <-> array, per kind: the one preprocessing that both training and serving use.

Images
    PNG, JPEG and WebP, recognised by their first bytes; a declared media type is believed only to refuse what is not taken.
    The first frame of an animation counts, EXIF orientation is applied, 16-bit greys are scaled to 8 bits, CMYK becomes RGB,
    and transparent pixels show ``modality.background``. The aspect is kept: the largest centred box of the modality's aspect is
    resized (bicubic, antialiased). A picture of the right size and mode passes through untouched, divided by 255.
Text
    NFKC, lower case where the modality asks for it, white space stripped at the ends, padded on the right with token 0. Never
    cut short: a text that is too long, or has a character outside the alphabet, is refused.
Vectors
    Finite numbers as measured; ``modality.mean`` and ``std`` standardise them on the way in and are undone on the way out.
Binary
    0, 1, true or false for each attribute, as a list in the modality's order or as an object that names every attribute.

Base64 may use the standard or the URL-safe alphabet, leave out its padding and hold ASCII white space.
"""

import base64
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import orjson
from jaxtyping import Float32, Float64, Int64, Shaped
from numpy.typing import NDArray

from model.image import array_from_file, array_from_image, file_from_array
from model.modality import BinaryModality, ImageModality, Modality, TextModality, VectorModality
from model.wire import DEFAULT_LIMITS, Code, CodecError, Limits, from_base64, kind, refuse_fields, to_base64

__all__ = ["Code", "CodecError", "Limits", "array_from_image", "decode", "decode_bytes", "encode"]

ImageFormat = Literal["png", "webp", "raw"]
VectorFormat = Literal["float", "base64"]
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
_UNDECLARED = frozenset({"", "application/octet-stream"})


def decode(modality: Modality, value: object, limits: Limits = DEFAULT_LIMITS) -> Shaped[np.ndarray, "..."]:
    """The array of one row from a value as it stands in JSON.

    Args:
        value: image: base64, a data URL or ``{"data": base64, "media_type": ...}``; text: a string; vector: a list of numbers
            or ``{"data": base64, "dtype": "float32"}`` (little-endian); binary: a list of 0 and 1 or an object of booleans.

    Returns:
        an array that ``check_array`` accepts: (*modality.shape) of ``modality.dtype``.

    Raises:
        CodecError: the value is not one of the modality.
    """
    if isinstance(modality, ImageModality):
        return _image_from_wire(modality, value, limits)
    if isinstance(modality, TextModality):
        return _tokens(modality, value, limits)
    if isinstance(modality, VectorModality):
        return _vector(modality, value)
    return _attributes(modality, value)


def decode_bytes(modality: Modality, content: bytes, limits: Limits = DEFAULT_LIMITS) -> Shaped[np.ndarray, "..."]:
    """The array of one row from a file's bytes: an image file, a text in UTF-8, or the JSON value of a vector or of attributes.

    Raises:
        CodecError: as ``decode``.
    """
    if isinstance(modality, ImageModality):
        return array_from_file(modality, content, limits)
    if isinstance(modality, TextModality):
        try:
            return _tokens(modality, content.decode(), limits)
        except UnicodeDecodeError as error:
            raise CodecError("bad_text", f"not UTF-8: byte {error.start} begins no character") from error
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        code: Code = "bad_vector" if isinstance(modality, VectorModality) else "bad_attributes"
        raise CodecError(code, f"not JSON: {error}") from error
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
        array: image (channels, height, width) in [0, 1]; text (length, alphabet) log-probabilities; vector (size,),
            standardised; binary (size,) probabilities.
        image_format: ``png`` and ``webp`` are lossless in 8 bits; ``raw`` is the array itself, little-endian, in base64.
        vector_format: a list of numbers, or little-endian float32 in base64.
    """
    if isinstance(modality, ImageModality):
        if image_format == "raw":
            return {"data": to_base64(array), "shape": list(array.shape), "dtype": "float32"}
        data = base64.b64encode(file_from_array(array, image_format)).decode()
        return {"media_type": f"image/{image_format}", "data": data, "width": modality.width, "height": modality.height}
    if isinstance(modality, TextModality):
        pad = modality.alphabet[0]
        return {"text": "".join(modality.alphabet[token] for token in array.argmax(axis=-1)).strip(pad)}
    if isinstance(modality, VectorModality):
        mean, std = _statistics(modality)
        measured = (array * std + mean).astype(np.float32)
        return {"data": to_base64(measured), "dtype": "float32"} if vector_format == "base64" else {"data": measured.tolist()}
    return {"data": dict(zip(modality.attributes, array.tolist(), strict=True))}


def _image_from_wire(modality: ImageModality, value: object, limits: Limits) -> Float32[np.ndarray, "channels height width"]:
    pointer, declared = "", ""
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


def _refuse_media_type(declared: str, pointer: str) -> None:
    media_type = declared.partition(";")[0].strip().lower()
    if media_type not in (*_UNDECLARED, *MEDIA_TYPES, "image/jpg"):
        raise CodecError(
            "unsupported_media_type",
            f"media type {reprlib.repr(media_type)} is not taken: send {', '.join(MEDIA_TYPES)}",
            pointer,
        )


def _tokens(modality: TextModality, value: object, limits: Limits) -> Int64[np.ndarray, " length"]:
    if not isinstance(value, str):
        raise CodecError("wrong_type", f"a text is a string; received {kind(value)}")
    if len(value) > limits.text_characters:
        raise CodecError("too_large", f"the text has {len(value)} characters, {limits.text_characters} are allowed")
    text = unicodedata.normalize("NFKC", value)
    text = (text.lower() if modality.lowercase else text).strip()
    if not text.strip(modality.alphabet[0]):
        raise CodecError("bad_text", "the text is empty: leave the modality out if it is absent")
    foreign = sorted(set(text) - (set(modality.alphabet) - {"\0"}))
    if foreign:
        raise CodecError(
            "bad_text", f"characters outside the alphabet: {reprlib.repr(foreign)}; allowed are {modality.alphabet!a}"
        )
    if len(text) > modality.length:
        raise CodecError("bad_text", f"the text has {len(text)} characters, at most {modality.length} are allowed")
    tokens = np.zeros(modality.length, dtype=np.int64)
    tokens[: len(text)] = [modality.alphabet.index(character) for character in text]
    return tokens


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
    if not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise CodecError(
            "bad_vector", f"number {index} is not finite in float32", f"/{index}" if isinstance(value, list) else "/data"
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
