"""JSON schemas and examples of each kind of modality, for the OpenAPI document."""

import re
from typing import Any

import numpy as np

from concord.model.codec import MAX_TEXTS, audio, media_types
from concord.model.codec.base64 import array_to_base64, bytes_to_base64
from concord.model.modality import (
    AudioModality,
    BinaryModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    is_picture_file,
    is_text,
)
from concord.service.api.requests import MAX_ID_CHARACTERS, MAX_WHOLE

_SMALLEST_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one black pixel
)


def item(modalities: tuple[Modality, ...]) -> dict[str, Any]:
    """One item: any non-empty subset of the modalities."""
    schemas: dict[str, list[dict[str, Any]]] = {}
    for modality in modalities:  # two bundles may use one name for different kinds
        schemas.setdefault(modality.name, []).extend(forms(modality))
    return {
        "title": "Input",
        "type": "object",
        "description": "An item: any non-empty subset of the bundle's modalities. null is the same as left out.",
        "properties": {
            "id": {
                "type": ["string", "integer", "null"],
                "maxLength": MAX_ID_CHARACTERS,
                "minimum": -MAX_WHOLE,
                "maximum": MAX_WHOLE,
                "description": "Echoed, as a string.",
            },
            **{name: {"anyOf": [*known, {"type": "null"}]} for name, known in schemas.items()},
        },
        "anyOf": [{"required": [name], "properties": {name: {"anyOf": known}}} for name, known in schemas.items()],
        "additionalProperties": False,
    }


def forms(modality: Modality) -> list[dict[str, Any]]:  # noqa: PLR0911 - one for each kind
    """Schemas of the forms a value may take."""
    base64: dict[str, Any] = {"type": "string", "contentEncoding": "base64"}
    if isinstance(modality, EncodedModality):
        return [*_encoded(modality), *_vector(modality)]
    if isinstance(modality, ImageModality) and not modality.in_files:
        numbers = {"data": base64, "shape": {"const": list(modality.shape)}, "dtype": {"const": "float32"}}
        return [_object(numbers, list(numbers))]
    if isinstance(modality, ImageModality):
        return _file(modality, f"becomes {modality.channels}x{modality.height}x{modality.width}")
    if isinstance(modality, AudioModality):
        shape = f"{modality.seconds:g} s, {modality.mels} bands x {modality.frames} frames"
        return _file(modality, f"becomes a spectrogram of {shape}")
    if isinstance(modality, TextModality):
        return [_text(modality)]
    if isinstance(modality, CategoricalModality):
        class_numbers = [number for name in modality.classes if (number := _number(name)) is not None]
        return [{"enum": [*modality.classes, *class_numbers]}]
    if isinstance(modality, VectorModality):
        return _vector(modality)
    size = {"minItems": len(modality.attributes), "maxItems": len(modality.attributes)}
    switch = {"enum": [0, 1, True, False]}
    named = _object(dict.fromkeys(modality.attributes, switch), list(modality.attributes))
    return [{"type": "array", "items": switch, **size}, named, *([switch] if len(modality.attributes) == 1 else [])]


def _file(modality: ImageModality | AudioModality | EncodedModality, becomes: str) -> list[dict[str, Any]]:
    """A file in base64, or an object with its media type."""
    base64 = {"type": "string", "contentEncoding": "base64", "format": modality.kind}
    fields = {"data": base64, "media_type": {"anyOf": [{"enum": list(media_types(modality))}, {"type": "null"}]}}
    accepted = "WAV, FLAC, OGG or MP3 of any sample rate" if modality.kind == "audio" else "PNG, JPEG or WebP"
    return [
        {**base64, "description": f"{accepted} in base64, or a data URL; {becomes}."},
        _object(fields, ["data"]),
    ]


def _encoded(modality: EncodedModality) -> list[dict[str, Any]]:
    """A picture or a text for a frozen encoder. Its feature vector may stand for it."""
    becomes = f"becomes {modality.size} features of the encoder {modality.encoder}"
    if modality.kind == "image":
        return _file(modality, becomes)
    excess = "longer texts are cut" if modality.too_long == "cut" else "longer texts than it reads are rejected"
    text = {"type": "string", "minLength": 1}
    mean = f"Several texts of the same thing, in any order; their mean {becomes}, {excess}."
    return [
        {**text, "description": f"A text; {becomes}, {excess}."},
        {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_TEXTS, "description": mean},
    ]


def _vector(modality: VectorModality) -> list[dict[str, Any]]:
    """A list of numbers, or float32 in base64."""
    size = {"minItems": modality.size, "maxItems": modality.size}
    data = {"type": "string", "contentEncoding": "base64"}
    packed = _object({"data": data, "dtype": {"const": "float32"}}, ["data", "dtype"])
    single = [{"type": "number"}] if modality.size == 1 else []
    return [{"type": "array", "items": {"type": "number"}, **size}, packed, *single]


def _number(name: str) -> int | None:
    """The whole number that is the name of a class."""
    return int(name) if name.removeprefix("-").isdecimal() and str(int(name)) == name else None


def _text(modality: TextModality) -> dict[str, Any]:
    limit = "At most {} of the" if modality.too_long == "refuse" else "The first {} count of the"
    if modality.unit == "word":
        known = f"{len(modality.vocabulary)} words are known, all others are read as one unknown word."
        return {"type": "string", "minLength": 1, "description": f"{limit.format(modality.length)} text's words; {known}"}
    if modality.unit == "subword":
        known = "frequent words and parts of words."
        return {"type": "string", "minLength": 1, "description": f"{limit.format(modality.length)} text's subwords: {known}"}
    schema: dict[str, Any] = {"type": "string"}
    if modality.unknown_token is None:
        schema["pattern"] = _pattern(modality)
    if modality.too_long == "refuse":
        schema["maxLength"] = modality.length
    return {**schema, "description": f"{limit.format(modality.length)} characters {modality.alphabet!a}."}


def _pattern(modality: TextModality) -> str:
    """Regular expression of its texts: any of the characters, and at least one that is neither white space nor padding. The
    service also accepts what NFKC or stripping turns into such a text."""
    known = set(modality.alphabet) - {"\0"}
    if modality.lowercase:
        known |= {character.upper() for character in known if len(character.upper()) == 1}
    filled = {character for character in known if not character.isspace()} - {modality.alphabet[0]}
    some, any_ = ("".join(re.escape(character) for character in sorted(chars)) for chars in (filled, known))
    return f"^[{any_}]*[{some}][{any_}]*$"


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def part(modality: Modality) -> dict[str, Any]:
    """Schema of the modality's part in a form."""
    if is_picture_file(modality):
        return {"type": "string", "format": "binary", "description": "The picture's file."}
    if isinstance(modality, AudioModality):
        return {"type": "string", "format": "binary", "description": "The audio file."}
    if isinstance(modality, BinaryModality | VectorModality | ImageModality) and not is_text(modality):
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": forms(modality)}}
    return forms(modality)[0]


def example(modality: Modality) -> Any:  # noqa: PLR0911 - one for each kind
    """A valid value of the modality."""
    if is_picture_file(modality):
        return _SMALLEST_PNG
    if isinstance(modality, AudioModality):
        return _click(modality)
    if isinstance(modality, EncodedModality):
        return "a short text"
    if isinstance(modality, ImageModality):
        black = array_to_base64(np.zeros(modality.shape, dtype=np.float32))
        return {"data": black, "shape": list(modality.shape), "dtype": "float32"}
    if isinstance(modality, CategoricalModality):
        return modality.classes[0]
    if isinstance(modality, TextModality):
        if modality.unit == "subword":
            return "a"  # any text of one byte has one subword
        known = modality.vocabulary or [c for c in modality.alphabet[1:] if not c.isspace()]
        return (" " if modality.vocabulary else "").join(known[: min(modality.length, 5)])
    if isinstance(modality, VectorModality):
        return [0.0] * modality.size
    return dict.fromkeys(modality.attributes, True)


def _click(modality: AudioModality) -> str:
    """The shortest sound that is not silent, a WAV file in base64."""
    samples = np.zeros(modality.window, dtype=np.float32)
    samples[modality.window // 2] = 0.5
    return bytes_to_base64(audio.wav_from_samples(samples, modality.sample_rate))
