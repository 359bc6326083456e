"""Renders a configuration for a Parquet file from its inferred schema."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord.model.modality import MAX_MODALITIES, propose_name
from concord.training.data.infer_schema import ColumnSchema
from concord.training.errors import DataError
from concord.training.machine import bfloat16_flags

HELD_OUT = 0.1
_JOINT_STEPS = 2000  # training steps of the joint stage; refiner and align stage get a quarter and a half of its epochs
_BATCH_SIZE = 128
_CONTRAST_ROWS, _CONTRAST_EPOCHS, _CONTRAST_BATCH = 300_000, 120, 256  # of all epochs together; largest numbers
FROZEN_FEATURES = 128
"""Vectors of at least this size are taken for features of frozen networks."""


def name_modalities(schemas: Sequence[ColumnSchema]) -> dict[str, ColumnSchema]:
    """Return the schemas that are modalities, by unique and valid modality names."""
    named: dict[str, ColumnSchema] = {}
    for schema in schemas:
        if schema.role in ("label", "split", "skipped"):
            continue
        title = schema.columns[0] if len(schema.columns) == 1 else {"vector": "numbers"}.get(schema.role, "attributes")
        base = propose_name(title, schema.role)
        name, number = base, 1
        while name in named:
            number += 1
            name = f"{base}_{number}"
        named[name] = schema
    return named


def render(file: Path, rows: int, schemas: Sequence[ColumnSchema]) -> str:
    """Return the text of a TOML configuration for ``file``.

    Args:
        file: the Parquet file.
        rows: number of its rows.
        schemas: of its columns, with at most ``MAX_MODALITIES`` modalities, see ``limit_modalities``.

    Raises:
        DataError: fewer than two columns can be modalities.
    """
    named = name_modalities(schemas)
    if len(named) < 2:
        columns = ", ".join(f"{', '.join(schema.columns)} ({schema.role}: {schema.note})" for schema in schemas)
        raise DataError(f"{file}: has {len(named)} columns that can be modalities, at least two are needed. Columns: {columns}")
    inputs = [schema for schema in named.values() if schema.role != "categorical"]
    are_features = any(_is_feature_vector(schema) for schema in inputs) and all(
        schema.role == "binary" or _is_feature_vector(schema) for schema in inputs
    )
    lines = [
        f"# Generated from {_comment(file.name)}, {rows:,} rows. Check the inferred kinds and sizes.",
        "#   concord check <this file>",
        "#   concord fit <this file>",
        "",
        f"name = {_toml(re.sub(r'[^a-z0-9_-]+', '-', file.stem.lower()).strip('-_')[:48] or 'model')}",
        f"# threads = {len(os.sched_getaffinity(0))}  # left out: OMP_NUM_THREADS, or else all available cores",
        _precision(),
        "",
        f"# 2 to {MAX_MODALITIES} modalities. Each may set weight, the factor of its log-likelihood.",
        "# The default balances modalities of different sizes.",
        "",
    ]
    for name, schema in named.items():
        lines += _modality(name, schema)
    lines += _data(file, named, schemas)
    batch_size = min(_BATCH_SIZE, max(8, rows // 10))
    epochs = min(100, max(4, _JOINT_STEPS * batch_size // max(1, rows)))
    lines += [
        "[network]",
        "latent = 32           # size of an embedding",
        *(['encoders = "shallow"  # for features of frozen networks; "deep" for other numbers'] if are_features else []),
        "",
        "[objective]",
        "# weight of the KL term. Higher: embeddings separate classes better. Lower: better pictures and likelihood",
        "beta = 1.0",
        'weights = "information" # of modalities without weight; "size": a single number counts as much as all pixels',
        "",
        "[joint]",
        f"epochs = {epochs}",
        f"batch_size = {batch_size}",
        "",
        "[refiner]",
        f"epochs = {max(1, epochs // 4)}",
        f"batch_size = {batch_size}",
        "steps = 2             # refinement steps of the teacher",
        "",
        "# embeddings of a row's modalities, and of several together, find each other, and predict its classes.",
        "# 0 epochs and contrast_weight = 0: without",
        "[contrast]",
        f"epochs = {min(_CONTRAST_EPOCHS, max(4, _CONTRAST_ROWS // max(1, rows)))}",
        f"batch_size = {min(_CONTRAST_BATCH, max(8, rows // 10))}",
        f"dropout = {0.5 if are_features else 0.25}",
        "prediction = 4.0",
        "multimodal_weight = 1.0",
        "weight_decay = 0.05",
        "",
        "[align]",
        f"epochs = {max(2, epochs // 2)}",
        f"batch_size = {batch_size}",
        "contrast_weight = 100.0",
    ]
    return "\n".join(lines) + "\n"


def _is_feature_vector(schema: ColumnSchema) -> bool:
    return schema.role == "vector" and int(schema.fields["size"]) >= FROZEN_FEATURES


def _precision() -> str:
    """Return the line of the precision that is faster on this processor."""
    found = bfloat16_flags()
    if found:
        return f'precision = "bfloat16" # this processor computes with it ({", ".join(found)}), which is faster; or "float32"'
    return 'precision = "float32"  # "bfloat16" is slower on this processor; it is faster on those with AMX or AVX512_BF16'


def _modality(name: str, schema: ColumnSchema) -> list[str]:
    learned = {"text": "its tokens are", "categorical": "the classes are", "vector": "mean and std are"}.get(schema.role)
    lines = [
        f"# {_comment(', '.join(schema.columns))}: {_comment(schema.note)}; absent in {schema.nulls:,} rows",
        "[[modalities]]",
        f"name = {_toml(name)}",
        f'kind = "{schema.role}"',
        *(_field(key, value, schema) for key, value in schema.fields.items()),
    ]
    if "encoder" in schema.fields:
        learned = None
        lines += [
            f"# a frozen network computes the features of each {schema.role}; generated values are features too. To generate",
            f"# {schema.role}s, add a second modality without encoder that has the same column",
        ]
    if learned:
        lines.append(f"# {learned} learned from the training rows")
    if schema.role == "text" and schema.fields.get("unit") == "word":
        lines.append("# a word that only one training row has counts as unknown")
    return [*lines, ""]


def _field(key: str, value: Any, schema: ColumnSchema) -> str:
    """Return the line of a key of a modality, with a comment at the key that limits texts."""
    line = f"{key} = {_toml(value)}"
    if schema.role != "text" or key != "length":
        return line
    excess = "cut" if "too_long" in schema.fields else "rejected"
    return f"{line}  # maximum number of {schema.fields['unit']}s; longer texts are {excess}"


def _data(file: Path, named: dict[str, ColumnSchema], schemas: Sequence[ColumnSchema]) -> list[str]:
    label = next((schema for schema in schemas if schema.role == "label"), None)
    split = next((schema for schema in schemas if schema.role == "split"), None)
    columns = ", ".join(f"{n} = {_toml(s.columns[0] if len(s.columns) == 1 else list(s.columns))}" for n, s in named.items())
    lines = [
        "[data]",
        f"folder = {_toml(str(file.parent))}",
        'pairing = "row"       # the values of one row belong together',
        'bad_values = "absent" # unreadable values count as absent, with a warning; "fail" stops the run',
        'cache = "runs/cache"  # decoded values are kept here for later runs on the same file; remove the line to keep none',
        "",
        "[[data.sources]]",
        f"train = {_toml(file.name)}",
        f"split = {_toml(split.columns[0])}" if split else f"held_out = {HELD_OUT}        # share of rows used as test rows",
        f"columns = {{ {columns} }}",
        *([f"label = {_toml(label.columns[0])}  # classes for the linear probe; never an input"] if label else []),
        'licence = "not stated"  # of the data; it applies to the weights too',
        "",
    ]
    skipped = [f"#   {_comment(', '.join(s.columns))}: {_comment(s.note)}" for s in schemas if s.role == "skipped"]
    return [*lines, *(["# Columns that are not used:", *skipped, ""] if skipped else [])]


def _comment(text: str) -> str:
    """Replace line breaks and control characters, which a TOML comment cannot contain."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
