"""JSON value or file <-> array, for each kind of modality. Training and serving use the same functions.

Images
    PNG, JPEG and WebP, recognised by their first bytes. A declared media type is only checked: it must be one of these. An
    image is prepared in this order: the first frame of an animation, EXIF orientation, 16-bit grey to 8 bits, transparent
    pixels on ``modality.background``, conversion (CMYK too) to grey or RGB. Then the largest centred box with the modality's
    aspect ratio is resized (bicubic, antialiased) and divided by 255; an image that already has the modality's size is not
    resampled. Image files have 1 or 3 channels. For any other number of channels the value is the float32 array itself.
Audio
    WAV, FLAC, OGG and MP3, recognised and prepared as ``model.codec.audio`` describes. Generated spectrograms become WAV.
Text
    See ``model.codec.text``.
Vectors
    Measured numbers, finite and at most 1e9 standard deviations from the mean. ``parse`` standardises them with
    ``modality.mean`` and ``std``, ``render`` converts them back.
Binary
    0, 1, true or false for each attribute: a list in the modality's order, or an object that names every attribute.
Image or text with a frozen encoder
    The picture or the text becomes the input of the encoder (``model.codec.frozen``): a picture is prepared as the encoder's
    description says, a text is split by its tokenizer. A list of strings is several texts of the same thing, whose features are
    averaged. A list of numbers or ``{"data": base64, "dtype": "float32"}`` is the feature vector itself. ``render`` returns a
    feature vector.
Categorical
    The name of a class. Upper case, and white space at its ends, matter only where classes differ in nothing else. A number for
    a class whose name is that number, true and false for classes of these names.

Base64 may use the standard or the URL-safe alphabet, omit the padding, and contain ASCII white space. In a data URL it may be
percent-encoded. A UTF-8 byte order mark at the start of a file is ignored.
"""

import codecs
import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import orjson
from jaxtyping import Float32, Int64, Shaped

from concord.model.codec import audio
from concord.model.codec.base64 import array_to_base64, bytes_to_base64, from_base64
from concord.model.codec.errors import DEFAULT_LIMITS, Code, CodecError, Limits, check_fields, json_type
from concord.model.codec.frozen import MAX_TEXTS, Preprocessor, count_inputs, is_input, joined
from concord.model.codec.image import array_from_file, array_from_image, file_from_array
from concord.model.codec.text import text_from_array, tokens_from_text
from concord.model.codec.vector import MAX_DEVIATIONS, standardise, statistics, within_range
from concord.model.installation import not_installed
from concord.model.modality import (
    AudioModality,
    BinaryModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    fold,
    is_picture_file,
)

__all__ = [
    "MAX_TEXTS",
    "Code",
    "CodecError",
    "Limits",
    "Preprocessor",
    "array_from_image",
    "check_installed",
    "count_inputs",
    "is_input",
    "joined",
    "media_types",
    "parse",
    "parse_bytes",
    "render",
    "standardise",
    "standardised",
    "within_range",
]

ImageFormat = Literal["png", "webp", "raw"]
AudioFormat = Literal["wav", "raw"]
VectorFormat = Literal["float", "base64"]
IMAGE_MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
_UNKNOWN_MEDIA_TYPES = frozenset({"", "application/octet-stream"})
_CODE_IF_NOT_JSON: dict[str, Code] = {"image": "bad_image", "vector": "bad_vector", "binary": "bad_attributes"}
_MAX_CLASSES_NAMED = 20  # in an error message
_MAX_CLASSES_COMPARED, _MAX_CHARACTERS_COMPARED = 500, 64  # with an unknown class: a comparison takes 20 microseconds


def parse(  # noqa: PLR0911 - one for each kind
    modality: Modality, value: object, limits: Limits = DEFAULT_LIMITS, preprocessor: Preprocessor | None = None
) -> Shaped[np.ndarray, "..."]:
    """Array of one row from a JSON value.

    Args:
        preprocessor: of the frozen encoder, if the modality has one.
        value: depends on the kind:

            - image and audio: base64, a data URL or ``{"data": base64, "media_type": ...}``; for an image that does not have 1
              or 3 channels, ``{"data": base64, "shape": [channels, height, width], "dtype": "float32"}`` (little-endian),
            - text: a string,
            - vector: a list of numbers or ``{"data": base64, "dtype": "float32"}`` (little-endian),
            - binary: a list of 0 and 1, or an object of booleans,
            - categorical: the name of the class,
            - image or text with a frozen encoder: the image or text, a list of texts, or its feature vector in the forms of a
              vector.

            A single number or boolean is a list of one.

    Returns:
        an array (*modality.shape) of ``modality.dtype`` that passes ``check_array``, or the input of the frozen encoder.

    Raises:
        CodecError: the value is not valid for the modality.
    """
    if isinstance(modality, ImageModality) and not modality.in_files:
        return _parse_raw_image(modality, value)
    if isinstance(modality, ImageModality | AudioModality):
        return _parse_file(modality, value, limits)
    if isinstance(modality, TextModality):
        return tokens_from_text(modality, value, limits)
    if isinstance(modality, EncodedModality):
        return _parse_encoded(modality, value, limits, preprocessor)
    if isinstance(modality, VectorModality):
        return _parse_vector(modality, value)
    if isinstance(modality, CategoricalModality):
        return _parse_class(modality, value)
    return _parse_attributes(modality, value)


def parse_bytes(
    modality: Modality, content: bytes, limits: Limits = DEFAULT_LIMITS, preprocessor: Preprocessor | None = None
) -> Shaped[np.ndarray, "..."]:
    """Array of one row from the bytes of a file.

    Args:
        content: an image or audio file; a text or the name of a class in UTF-8; for all other modalities the JSON of
            ``parse``'s value.
        preprocessor: as in ``parse``.

    Raises:
        CodecError: as ``parse``.
    """
    if isinstance(modality, AudioModality):
        return audio.array_from_file(modality, content, limits)
    if isinstance(modality, ImageModality) and modality.in_files:
        return array_from_file(modality, content, limits)
    if isinstance(modality, EncodedModality) and modality.kind == "image":
        assert preprocessor is not None
        return standardised(modality, preprocessor.pixels(content, limits))
    if isinstance(modality, TextModality | CategoricalModality | EncodedModality):
        try:
            return parse(modality, content.decode("utf-8-sig"), limits, preprocessor)
        except UnicodeDecodeError as error:
            code: Code = "bad_class" if isinstance(modality, CategoricalModality) else "bad_text"
            raise CodecError(code, f"not UTF-8: no character starts at byte {error.start}") from error
    try:
        value = orjson.loads(content.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise CodecError(_CODE_IF_NOT_JSON[modality.kind], f"not JSON: {error}") from error
    return parse(modality, value, limits)


def render(
    modality: Modality,
    array: Shaped[np.ndarray, "..."],
    *,
    image_format: ImageFormat = "png",
    audio_format: AudioFormat = "wav",
    spectrogram: bool = False,
    seed: int = 0,
    vector_format: VectorFormat = "float",
) -> dict[str, Any]:
    """JSON value of one row of ``Runtime.decode``'s output.

    Args:
        array: image (channels, height, width) and audio (1, mels, frames) in [0, 1]; text (length, token) log-probabilities,
            or (length,) token ids with the ``autoregressive`` likelihood; vector (size,), standardised; binary (size,) and
            categorical (class,) probabilities.
        image_format: ``png`` and ``webp`` are lossless with 8 bits per channel; ``raw`` is the array as little-endian float32
            in base64. Images that do not have 1 or 3 channels are always ``raw``.
        audio_format: ``wav`` is a mono file with 16 bits; ``raw`` is the spectrogram as little-endian float32 in base64.
        spectrogram: whether audio has its spectrogram too, in the form of ``raw``.
        seed: of the phases of a generated sound.
        vector_format: ``float`` is a list of numbers, ``base64`` is little-endian float32 in base64.

    Returns:
        an object with the keys

            - image: ``media_type``, ``data`` (base64), ``width``, ``height``; ``raw``: ``data``, ``shape``, ``dtype``,
            - audio: ``media_type``, ``data`` (base64), ``sample_rate``, ``seconds``, and ``spectrogram`` on demand; ``raw``:
              ``data``, ``shape``, ``dtype``,
            - text: ``text``,
            - categorical: ``class``, the most likely one, and ``data``, the probability of each class,
            - vector: ``data`` in measured units, with ``dtype`` if it is base64,
            - binary: ``data``, the probability of each attribute.
    """
    if isinstance(modality, AudioModality):
        return _render_audio(modality, array, audio_format, seed, with_spectrogram=spectrogram)
    if isinstance(modality, ImageModality):
        return _render_image(modality, array, image_format)
    if isinstance(modality, TextModality):
        return {"text": text_from_array(modality, array)}
    if isinstance(modality, CategoricalModality):
        probabilities = dict(zip(modality.classes, array.tolist(), strict=True))
        return {"class": modality.classes[int(array.argmax())], "data": probabilities}
    if isinstance(modality, VectorModality):
        mean, std = statistics(modality)
        values = (array * std + mean).astype(np.float32)
        return {"data": array_to_base64(values), "dtype": "float32"} if vector_format == "base64" else {"data": values.tolist()}
    return {"data": dict(zip(modality.attributes, array.tolist(), strict=True))}


def _parse_encoded(
    modality: EncodedModality, value: object, limits: Limits, preprocessor: Preprocessor | None
) -> Shaped[np.ndarray, "..."]:
    """The input of the frozen encoder, or the standardised feature vector."""
    are_texts = modality.kind == "text" and isinstance(value, list) and (not value or isinstance(value[0], str))
    if not are_texts and (isinstance(value, list) or (isinstance(value, dict) and "dtype" in value)):
        return _parse_vector(modality, value)
    if modality.kind == "image":
        return _parse_file(modality, value, limits, preprocessor)
    assert preprocessor is not None
    return standardised(modality, preprocessor.texts(value, modality.too_long, limits))


def standardised(modality: EncodedModality, prepared: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """In training, a preprocessor returns features that it has already."""
    return prepared if is_input(prepared) else standardise(modality, prepared.astype(np.float64))


def media_types(modality: Modality) -> tuple[str, ...]:
    """Media types of the files that hold values of a modality, the first of them in output. Empty: it has no files."""
    if isinstance(modality, AudioModality):
        return audio.MEDIA_TYPES
    return IMAGE_MEDIA_TYPES if is_picture_file(modality) else ()


def check_installed(modalities: Iterable[Modality]) -> None:
    """Check that the optional packages that the modalities need can be imported.

    Raises:
        ImportError: one is missing. The message says how to install it.
    """
    for modality in modalities:
        if isinstance(modality, AudioModality):
            audio.check_installed()
        elif _needs_tokenizers(modality) and find_spec("tokenizers") is None:
            raise ImportError(not_installed("tokenizers", f"The text modality {modality.name}", "cpu"))


def _needs_tokenizers(modality: Modality) -> bool:
    has_subwords = isinstance(modality, TextModality) and modality.unit == "subword"
    return has_subwords or (isinstance(modality, EncodedModality) and modality.kind == "text")


def _render_raw(array: Float32[np.ndarray, "channels height width"]) -> dict[str, Any]:
    return {"data": array_to_base64(array), "shape": list(array.shape), "dtype": "float32"}


def _render_image(
    modality: ImageModality, array: Float32[np.ndarray, "channels height width"], image_format: ImageFormat
) -> dict[str, Any]:
    if image_format == "raw" or not modality.in_files:
        return _render_raw(array)
    data = bytes_to_base64(file_from_array(array, image_format))
    return {"media_type": f"image/{image_format}", "data": data, "width": modality.width, "height": modality.height}


def _render_audio(
    modality: AudioModality,
    array: Float32[np.ndarray, "1 mel frame"],
    audio_format: AudioFormat,
    seed: int,
    *,
    with_spectrogram: bool,
) -> dict[str, Any]:
    if audio_format == "raw":
        return _render_raw(array)
    file = audio.wav_from_samples(audio.samples_from_array(modality, array, seed), modality.sample_rate)
    return {
        "media_type": "audio/wav",
        "data": bytes_to_base64(file),
        "sample_rate": modality.sample_rate,
        "seconds": modality.samples / modality.sample_rate,
        **({"spectrogram": _render_raw(array)} if with_spectrogram else {}),
    }


def _parse_file(
    modality: ImageModality | AudioModality | EncodedModality,
    value: object,
    limits: Limits,
    preprocessor: Preprocessor | None = None,
) -> Shaped[np.ndarray, "..."]:
    """The row of a file in base64, in a data URL, or in an object with its media type."""
    pointer, declared = "", ""
    if isinstance(value, dict):
        check_fields(value, required=("data",), optional=("media_type",))
        declared = value["media_type"] if value.get("media_type") is not None else ""
        if not isinstance(declared, str):
            raise CodecError("wrong_type", "media_type must be a string", "/media_type")
        pointer, value = "/data", value["data"]
    if not isinstance(value, str):
        raise CodecError(
            "wrong_type",
            f"{modality.kind} is base64, a data URL or an object with data and media_type; received {json_type(value)}",
            pointer,
        )
    value = value.lstrip()
    if not pointer and value[:5].lower() == "data:":
        header, comma, value = value[5:].partition(",")
        header, value = unquote(header), unquote(value)
        declared, *parameters = header.split(";")
        if not comma or "base64" not in (p.strip().lower() for p in parameters):
            raise CodecError("bad_base64", "a data URL must read data:<media type>;base64,<data>")
    _check_media_type(modality, declared, "/media_type" if pointer else "")
    if value[:8].lower().startswith(("http://", "https://")):
        raise CodecError("bad_base64", "URLs are not fetched: send the file itself, in base64", pointer)
    most = limits.audio_bytes if isinstance(modality, AudioModality) else limits.image_bytes
    content = from_base64(value, pointer, most)
    try:
        return parse_bytes(modality, content, limits, preprocessor)
    except CodecError as error:
        error.pointer = pointer
        raise


def _parse_raw_image(modality: ImageModality, value: object) -> Float32[np.ndarray, "channels height width"]:
    if not isinstance(value, dict):
        raise CodecError(
            "wrong_type",
            f"image files cannot hold {modality.channels} channels: send an object with data, shape and dtype; "
            f"received {json_type(value)}",
        )
    check_fields(value, required=("data", "shape", "dtype"))
    if value["dtype"] != "float32":
        raise CodecError("bad_image", f"dtype must be 'float32', received {reprlib.repr(value['dtype'])}", "/dtype")
    if value["shape"] != list(modality.shape):
        received = reprlib.repr(value["shape"])
        raise CodecError("bad_image", f"the shape must be {list(modality.shape)}, received {received}", "/shape")
    if not isinstance(value["data"], str):
        raise CodecError("wrong_type", f"data must be base64 in a string; received {json_type(value['data'])}", "/data")
    content = from_base64(value["data"], "/data")
    size = 4 * math.prod(modality.shape)
    if len(content) != size:
        raise CodecError("bad_image", f"data has {len(content)} bytes, {size} are expected", "/data")
    array = np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(modality.shape)
    if not bool(np.all((array >= 0) & (array <= 1))):
        raise CodecError("bad_image", "values must be finite and within [0, 1]", "/data")
    return array


def _check_media_type(modality: Modality, declared: str, pointer: str) -> None:
    media_type, accepted = declared.partition(";")[0].strip().lower(), media_types(modality)
    if media_type not in (*_UNKNOWN_MEDIA_TYPES, *accepted) and (media_type != "image/jpg" or accepted != IMAGE_MEDIA_TYPES):
        raise CodecError(
            "unsupported_media_type",
            f"media type {reprlib.repr(media_type)} is not supported: send {', '.join(accepted)}",
            pointer,
        )


def _parse_class(modality: CategoricalModality, value: object) -> Int64[np.ndarray, " 1"]:
    name = _class_name(value)
    if name not in modality.class_ids:
        similar = modality.similar_classes.get(fold(name), ())
        if len(similar) != 1:
            raise _unknown_class(modality, value, similar)
        (name,) = similar
    return np.array([modality.class_ids[name]], dtype=np.int64)


def _class_name(value: object) -> str:
    """The name of the class that a value stands for: of a number, that number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    raise CodecError("wrong_type", f"a class is a string; received {json_type(value)}")


def _unknown_class(modality: CategoricalModality, value: object, similar: Sequence[str]) -> CodecError:
    names = modality.classes
    if not isinstance(value, str) and not any(_is_number(name) for name in names):
        return CodecError("wrong_type", f"a class is a string; received {json_type(value)}")
    received = f"received {reprlib.repr(value)}"
    if similar:
        return CodecError("bad_class", f"{received}: spell it as one of the classes {_listed(similar)}")
    if len(names) <= _MAX_CLASSES_NAMED:
        return CodecError("bad_class", f"{received}, the classes are {_listed(names)}")
    wanted, candidates = fold(str(value)[:_MAX_CHARACTERS_COMPARED]), list(modality.similar_classes)
    if len(candidates) > _MAX_CLASSES_COMPARED:
        candidates = [name for name in candidates if name[:1] == wanted[:1]][:_MAX_CLASSES_COMPARED]
    near = difflib.get_close_matches(wanted, candidates, n=5, cutoff=0.5)
    if near:
        nearest = [name for key in near for name in modality.similar_classes[key]]
        return CodecError("bad_class", f"{received}, the nearest of the {len(names):,} classes are {_listed(nearest)}")
    return CodecError("bad_class", f"{received}, none of the {len(names):,} classes is similar: they are {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    """At most ``_MAX_CLASSES_NAMED`` names, and how many more there are."""
    hidden = len(names) - _MAX_CLASSES_NAMED
    listed = ", ".join(repr(name[:_MAX_CHARACTERS_COMPARED]) for name in names[:_MAX_CLASSES_NAMED])
    return f"{listed} and {hidden:,} more" if hidden > 0 else listed


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _parse_vector(modality: VectorModality, value: object) -> Float32[np.ndarray, " size"]:
    if isinstance(value, dict):
        check_fields(value, required=("data", "dtype"))
        if value["dtype"] != "float32":
            raise CodecError("bad_vector", f"dtype must be 'float32', received {reprlib.repr(value['dtype'])}", "/dtype")
        if not isinstance(value["data"], str):
            raise CodecError("wrong_type", f"data must be base64 in a string; received {json_type(value['data'])}", "/data")
        content = from_base64(value["data"], "/data")
        if len(content) != 4 * modality.size:
            raise CodecError(
                "bad_vector", f"data has {len(content)} bytes, {modality.size} float32 take {4 * modality.size}", "/data"
            )
        numbers = np.frombuffer(content, dtype="<f4").astype(np.float64)
    else:
        numbers = np.array(_check_numbers(value, modality.size), dtype=np.float64)
    array = standardise(modality, numbers)
    allowed = within_range(array)
    if not allowed.all():
        index = int(np.argmin(allowed))
        raise CodecError(
            "bad_vector",
            f"number {index} is not finite, or more than {MAX_DEVIATIONS:g} standard deviations from the mean",
            "/data" if isinstance(value, dict) else _place(value, index),
        )
    return array


def _check_numbers(value: object, size: int) -> list[float]:
    numbers = []
    for index, number in enumerate(_check_list(value, size, "bad_vector", "a vector")):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise CodecError("bad_vector", f"a vector holds numbers; received {json_type(number)}", _place(value, index))
        try:
            numbers.append(float(number))
        except OverflowError as error:
            raise CodecError("bad_vector", f"number {index} is not finite in float32", _place(value, index)) from error
    return numbers


def _parse_attributes(modality: BinaryModality, value: object) -> Float32[np.ndarray, " size"]:
    if isinstance(value, dict):
        unknown, missing = sorted(set(value) - set(modality.attributes)), [a for a in modality.attributes if a not in value]
        if unknown or missing:
            raise CodecError(
                "bad_attributes",
                f"every attribute must be named: unknown {reprlib.repr(unknown)}, missing {reprlib.repr(missing)}",
            )
        values = [value[attribute] for attribute in modality.attributes]
    else:
        values = _check_list(value, len(modality.attributes), "bad_attributes", "attributes")
    for attribute, bit in zip(modality.attributes, values, strict=True):
        if not isinstance(bit, int | float) or bit not in (0, 1):  # a bool is an int
            escaped = attribute.replace("~", "~0").replace("/", "~1")
            raise CodecError(
                "bad_attributes",
                f"{attribute} must be 0, 1, true or false; received {reprlib.repr(bit)}",
                f"/{escaped}" if isinstance(value, dict) else _place(value, modality.attributes.index(attribute)),
            )
    return np.array(values, dtype=np.float32)


def _check_list(value: object, size: int, code: Code, noun: str) -> list[object]:
    if size == 1 and isinstance(value, int | float):
        return [value]
    if not isinstance(value, list):
        raise CodecError("wrong_type", f"{noun} must be a list or an object; received {json_type(value)}")
    if len(value) != size:
        raise CodecError(code, f"the list has {len(value)} entries, {size} are expected")
    return value


def _place(value: object, index: int) -> str:
    """JSON pointer of an entry, also of the only one, which may stand without a list."""
    return f"/{index}" if isinstance(value, list) else ""
