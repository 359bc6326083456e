"""What the values of each kind of modality look like: their JSON schemas and an example, for the OpenAPI document."""

import re
from typing import Any

import numpy as np

from model.codec import MEDIA_TYPES
from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from model.wire import to_base64
from service.calls import MAX_ID_CHARACTERS

_SMALLEST_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one black pixel
)


def item(modalities: tuple[Modality, ...]) -> dict[str, Any]:
    """One item: any subset of the modalities, but the empty one."""
    wire: dict[str, list[dict[str, Any]]] = {}
    for modality in modalities:  # bundles may use one name for different things
        wire.setdefault(modality.name, []).extend(forms(modality))
    return {
        "title": "Input",
        "type": "object",
        "description": "A sample: any non-empty subset of the bundle's modalities. null is the same as left out.",
        "properties": {
            "id": {"type": ["string", "null"], "maxLength": MAX_ID_CHARACTERS, "description": "Echoed."},
            **{name: {"anyOf": [*known, {"type": "null"}]} for name, known in wire.items()},
        },
        "anyOf": [{"required": [name], "properties": {name: {"anyOf": known}}} for name, known in wire.items()],
        "additionalProperties": False,
    }


def forms(modality: Modality) -> list[dict[str, Any]]:
    """Schemas of the forms a value may take."""
    base64: dict[str, Any] = {"type": "string", "contentEncoding": "base64"}
    if isinstance(modality, ImageModality) and not modality.in_files:
        numbers = {"data": base64, "shape": {"const": list(modality.shape)}, "dtype": {"const": "float32"}}
        return [_object(numbers, list(numbers))]
    if isinstance(modality, ImageModality):
        base64["format"] = "image"
        fields = {"data": base64, "media_type": {"anyOf": [{"enum": list(MEDIA_TYPES)}, {"type": "null"}]}}
        told = f"PNG, JPEG or WebP in base64, or a data URL; becomes {modality.channels}x{modality.height}x{modality.width}."
        return [{**base64, "description": told}, _object(fields, ["data"])]
    if isinstance(modality, TextModality):
        return [_text(modality)]
    if isinstance(modality, CategoricalModality):
        return [{"enum": list(modality.classes)}]
    if isinstance(modality, VectorModality):
        size = {"minItems": modality.size, "maxItems": modality.size}
        packed = _object({"data": base64, "dtype": {"const": "float32"}}, ["data", "dtype"])
        return [{"type": "array", "items": {"type": "number"}, **size}, packed]
    size = {"minItems": len(modality.attributes), "maxItems": len(modality.attributes)}
    switch = {"enum": [0, 1, True, False]}
    named = _object(dict.fromkeys(modality.attributes, switch), list(modality.attributes))
    return [{"type": "array", "items": switch, **size}, named]


def _text(modality: TextModality) -> dict[str, Any]:
    limit = "At most {} of the" if modality.too_long == "refuse" else "The first {} count of the"
    if modality.unit == "word":
        told = f"{limit.format(modality.length)} text's words; {len(modality.vocabulary)} words are known, all others are one."
        return {"type": "string", "minLength": 1, "description": told}
    schema: dict[str, Any] = {"type": "string"}
    if modality.unknown_token is None:
        schema["pattern"] = _pattern(modality)
    if modality.too_long == "refuse":
        schema["maxLength"] = modality.length
    return {**schema, "description": f"{limit.format(modality.length)} characters {modality.alphabet!a}."}


def _pattern(modality: TextModality) -> str:
    """Of its texts: any of the characters, and one at least that is neither white space nor padding. What NFKC or stripping
    would turn into one is taken too, and not told here."""
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
    if isinstance(modality, ImageModality) and modality.in_files:
        return {"type": "string", "format": "binary", "description": "The picture's file."}
    if isinstance(modality, BinaryModality | VectorModality | ImageModality):
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": forms(modality)}}
    return forms(modality)[0]


def example(modality: Modality) -> Any:
    """A value that the modality takes."""
    if isinstance(modality, ImageModality) and modality.in_files:
        return _SMALLEST_PNG
    if isinstance(modality, ImageModality):
        black = to_base64(np.zeros(modality.shape, dtype=np.float32))
        return {"data": black, "shape": list(modality.shape), "dtype": "float32"}
    if isinstance(modality, CategoricalModality):
        return modality.classes[0]
    if isinstance(modality, TextModality):
        known = modality.vocabulary or [c for c in modality.alphabet[1:] if not c.isspace()]
        return (" " if modality.vocabulary else "").join(known[: min(modality.length, 5)])
    if isinstance(modality, VectorModality):
        return [0.0] * modality.size
    return dict.fromkeys(modality.attributes, True)
