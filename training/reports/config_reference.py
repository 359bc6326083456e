"""The reference of the configuration file, generated from its pydantic models."""

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from concord.model.modality import (
    AudioModality,
    BinaryModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    TextModality,
    VectorModality,
)
from concord.training import config

OF_MODALITIES = ("name", "kind", "weight")
OF_IMAGES = tuple(key for key in ImageModality.model_fields if key not in OF_MODALITIES)
OF_STAGES = tuple(key for key in config.Stage.model_fields if key != "epochs")
TABLES: Mapping[str, tuple[type[BaseModel], Sequence[str]]] = {
    "Top level": (config.Config, ()),
    "Every `[[modalities]]`, of which a model has two to twelve": (ImageModality, (*OF_IMAGES, "kind")),
    '`[[modalities]]`, `kind = "image"`': (ImageModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "audio"`': (AudioModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "text"`': (TextModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "image"` or `"text"`, with a frozen encoder': (EncodedModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "vector"`': (VectorModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "binary"`': (BinaryModality, OF_MODALITIES),
    '`[[modalities]]`, `kind = "categorical"`': (CategoricalModality, OF_MODALITIES),
    "`[data]`": (config.Data, ()),
    "`[[data.sources]]`": (config.Source, ()),
    "`[[data.sources]]`, `train` or `test` on the Hugging Face hub": (config.Hub, ()),
    "`[network]`": (config.Network, ()),
    "`[objective]`": (config.Objective, ()),
    "Every stage": (config.Stage, ("epochs",)),
    "`[joint]`": (config.Joint, OF_STAGES),
    "`[refiner]`": (config.Refiner, OF_STAGES),
    "`[contrast]`": (config.Contrast, tuple(key for key in OF_STAGES if key != "batch_size")),
    "`[align]`": (config.Align, OF_STAGES),
    "`[refresh]`": (config.Refresh, OF_STAGES),
    "`[flow]`": (config.Flow, OF_STAGES),
    "`[validation]`": (config.Validation, ()),
    "`[gallery.<modality>]`": (config.GallerySettings, ()),
}
"""Heading, model, and keys that another table or a heading has."""
DEFAULTS = {"segmentation": '`"unicode"`'}
"""Defaults of a configuration that are not those of a bundle's manifest."""


def config_reference() -> str:
    """Return a Markdown table of every key for each table of the configuration file."""
    return "\n\n".join(f"{title}:\n\n{_table(model, skipped)}" for title, (model, skipped) in TABLES.items())


def _table(model: type[BaseModel], skipped: Sequence[str]) -> str:
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    descriptions = _descriptions(model)
    properties = model.model_json_schema()["properties"]
    for key, schema in properties.items():
        field = model.model_fields[key]
        has_table = "$ref" in schema or "$ref" in str([schema.get("items"), schema.get("additionalProperties")])
        if has_table or key in skipped:
            continue
        default = "required" if field.is_required() else DEFAULTS.get(key) or _literal(field.default)
        lines.append(f"| `{key}` | {_values(schema)} | {default} | {descriptions.get(key, '')} |")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return "`[]`" if not value else f"`{list(value)}`"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{value}`" if isinstance(value, int | float) else f'`"{value}"`'


def _values(schema: Mapping[str, Any]) -> str:
    """Return the allowed values of a JSON schema in words."""
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_values(choice) for choice in choices if choice.get("type") != "null"))
    if allowed := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return ", ".join(f'`"{value}"`' for value in allowed)
    kind = schema.get("type", "table")
    words = {"string": "text", "boolean": "`true`, `false`"}.get(kind, kind)
    if kind == "array":
        words = f"list of {_values(schema['items'])}"
    elif kind == "object":
        words = f"table of {_values(schema['additionalProperties'])}"
    return f"{words}{_bounds(schema)}"


def _bounds(schema: Mapping[str, Any]) -> str:
    """Return the bounds of a number in words: `` 1 to 64``, `` > 0 and ≤ 1``, `` ≥ 2, a multiple of 2``."""
    low, high = schema.get("minimum"), schema.get("maximum")
    is_integer = schema.get("type") == "integer"
    if is_integer and low is None and "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + 1
    if low is not None and high is not None:
        bounds = f", {low:g} to {high:g}"
    else:
        above = None if is_integer else schema.get("exclusiveMinimum")
        signs = {">": above, "≥": low, "≤": high, "<": schema.get("exclusiveMaximum")}
        bounds = " and".join(f" {sign} {bound:g}" for sign, bound in signs.items() if bound is not None)
    return bounds + (f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else "")


def _descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a model and of its base classes, on one line."""
    descriptions: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                    line = " ".join(docstring.split())
                    descriptions[name] = line.replace("``", "`").replace("|", "\\|").replace("None:", "Left out:")
    return descriptions
