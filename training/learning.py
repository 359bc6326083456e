"""What the training rows tell of a modality: statistics of a vector, alphabet or vocabulary of a text, the classes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from model.modality import UNKNOWN_CHARACTER, Modality, TextModality, VectorModality, unlearned
from model.text import pieces
from training.columns import Rows, columns_of, decode, texts
from training.config import Config
from training.room import moments
from training.sources import DataError, judge, names_of, open_rows, read_labels

ENOUGH_ROWS = 2
"""A character or a word that fewer rows have is left to the unknown ones, which so are learned too."""


def learn(config: Config, folder: Path) -> tuple[dict[str, Modality], tuple[str, ...] | None]:
    """The modalities by name, whatever they lack filled in from the training rows; and the names of labels that are strings.

    Both are the same for either split. Only the columns that are needed are read.

    Raises:
        DataError: the rows cannot be read, or hold nothing to learn from.
    """
    modalities: dict[str, Modality] = {m.name: m for m in config.modalities}
    class_names = config.data.class_names
    for source in config.data.sources:
        lacking = {name: columns for name, columns in source.columns.items() if _is_incomplete(modalities[name])}
        by_string = source.label is not None and class_names is None
        if not lacking and not by_string:
            continue
        rows = open_rows(source, "train", folder, config.data.rows)
        if by_string and str(getattr(rows.table.features[source.label], "dtype", "")).endswith("string"):
            class_names = read_labels(rows, str(source.label), None)[1]
        for name, columns in lacking.items():
            names = class_names if columns == source.label and class_names else names_of(rows, columns)
            modalities[name] = _learned(config, modalities[name], rows, columns, names)
    return modalities, class_names


def _is_incomplete(modality: Modality) -> bool:
    if isinstance(modality, VectorModality):
        return modality.mean is None or modality.std is None
    return unlearned(modality) is not None


def _learned(
    config: Config, modality: Modality, rows: Rows, columns: str | tuple[str, ...], names: tuple[str, ...] | None
) -> Modality:
    found: dict[str, Any]
    if isinstance(modality, VectorModality):
        found = _statistics(config, modality, rows, columns)
    elif isinstance(modality, TextModality):
        found = _tokens(modality, rows, columns, names, config.data.max_vocabulary)
    else:
        found = {"classes": names or _classes(modality, rows, columns)}
    # Made anew instead of copied: what was derived from the empty fields must not go along.
    return type(modality).model_validate({**modality.model_dump(), **found})


def _statistics(config: Config, modality: VectorModality, rows: Rows, columns: str | tuple[str, ...]) -> dict[str, Any]:
    raw = modality.model_copy(update={"mean": None, "std": None})
    column = decode(rows, columns_of(columns), raw, None, most_bytes=config.data.most_bytes)
    judge(rows, modality.name, columns, column, config.data.bad_values)
    if not column.present.any():
        raise DataError(f"{rows.file}: no row holds {modality.name}: give it a mean and a std, or leave the modality out")
    mean, std = moments(column.values, np.flatnonzero(column.present))
    found = {"mean": tuple(mean.tolist()), "std": tuple(np.where(std > 0, std, 1.0).tolist())}
    return {key: value if getattr(modality, key) is None else getattr(modality, key) for key, value in found.items()}


def _tokens(
    modality: TextModality, rows: Rows, columns: str | tuple[str, ...], names: tuple[str, ...] | None, most: int
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for listed in texts(rows, columns_of(columns), names):
        counts.update({piece for text in listed for piece in pieces(text, modality.unit, modality.lowercase)})
    for never in (" ", "\0", UNKNOWN_CHARACTER) if modality.unit == "character" else ():
        counts.pop(never, None)
    common = {piece: count for piece, count in counts.items() if count >= ENOUGH_ROWS} or counts
    if not common:
        raise DataError(f"{rows.file}: no row holds {modality.name}: give it an alphabet or a vocabulary, or leave it out")
    if modality.unit == "word":
        return {"vocabulary": tuple(sorted(common, key=lambda word: (-common[word], word))[:most])}
    return {"alphabet": " " + "".join(sorted(common)) + UNKNOWN_CHARACTER}


def _classes(modality: Modality, rows: Rows, columns: str | tuple[str, ...]) -> tuple[str, ...]:
    classes = sorted({text for listed in texts(rows, columns_of(columns), None) for text in listed})
    if len(classes) < 2:
        raise DataError(
            f"{rows.file}: column {columns!r} holds {len(classes)} classes of {modality.name}, two are the least: "
            "name the classes, or leave the modality out"
        )
    return tuple(classes)
