"""Preprocessing parameters fitted to the training rows: mean and std of vectors, alphabets, vocabularies and classes."""

from collections import Counter
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from concord.model.codec import subwords
from concord.model.codec.text import normalised, tokenize
from concord.model.modality import (
    UNKNOWN_CHARACTER,
    EncodedModality,
    Modality,
    TextModality,
    VectorModality,
    WeightRule,
    missing_statistics,
    resolve_weights,
)
from concord.training.config import Config
from concord.training.data.columns import Rows, column_names, describe_absence, read_names
from concord.training.data.memmap import moments
from concord.training.data.sources import Encoders, has_strings, open_rows, read_class_names, read_labels
from concord.training.errors import DataError

MIN_ROWS = 2
"""A character or word that occurs in fewer rows is treated as unknown. The unknown token is thus trained as well."""


def fit_preprocessing(
    config: Config, folder: Path, encoders: Encoders = MappingProxyType({})
) -> tuple[dict[str, Modality], tuple[str, ...] | None]:
    """Complete the modalities with parameters fitted to the training rows.

    The result does not depend on the split. Only columns with missing parameters are read.

    Args:
        encoders: features of the modalities with a frozen encoder, by modality.

    Returns:
        the modalities by name, and the names of the label classes if the labels are strings or the configuration names them.

    Raises:
        DataError: the rows cannot be read, or no row has the modality.
    """
    modalities: dict[str, Modality] = {m.name: _completed(m, encoders) for m in config.modalities}
    class_names = config.data.class_names
    for source in config.data.sources:
        incomplete = {name: columns for name, columns in source.columns.items() if _is_incomplete(modalities[name])}
        needs_class_names = source.label is not None and class_names is None
        if not incomplete and not needs_class_names:
            continue
        rows = open_rows(source, "train", folder, config.data.rows, encoders)
        if needs_class_names and has_strings(rows.table, str(source.label)):
            class_names = read_labels(rows, str(source.label), None)[1]
        for name, columns in incomplete.items():
            names = class_names if columns == source.label and class_names else read_class_names(rows, columns)
            modalities[name] = _fit_modality(config, modalities[name], rows, column_names(columns), names)
    return _with_weights(modalities, config.objective.weights), class_names


def _with_weights(modalities: dict[str, Modality], rule: WeightRule) -> dict[str, Modality]:
    """Return the modalities with the weights of a rule. Those of ``size`` are left out, as in earlier bundles and runs."""
    if rule == "size":
        return modalities
    weights = resolve_weights(list(modalities.values()), rule)
    return {name: type(m).model_validate({**m.model_dump(), "weight": weights[name]}) for name, m in modalities.items()}


def _is_incomplete(modality: Modality) -> bool:
    if isinstance(modality, VectorModality):
        return modality.mean is None or modality.std is None
    return missing_statistics(modality) is not None


def _fit_modality(
    config: Config, modality: Modality, rows: Rows, columns: tuple[str, ...], class_names: tuple[str, ...] | None
) -> Modality:
    fields: dict[str, Any]
    if isinstance(modality, VectorModality):
        fields = _fit_mean_and_std(modality, rows, columns)
    elif isinstance(modality, TextModality):
        fields = _fit_tokens(modality, rows, columns, class_names, config.data.max_vocabulary)
    else:
        is_configured = class_names is not None and class_names == config.data.class_names
        fields = {"classes": class_names if is_configured else _fit_classes(modality, rows, columns, class_names)}
    # Validated from scratch: model_copy would keep cached properties that were computed from the empty fields.
    return type(modality).model_validate({**modality.model_dump(), **fields})


def _fit_mean_and_std(modality: VectorModality, rows: Rows, columns: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields ``mean`` and ``std``. A configured field is kept; a std of zero becomes 1.

    They are those of the numbers as measured, in any unit. Rows that cannot be parsed have no influence.
    """
    rows.compute_features(columns, modality, None)
    reader = rows.reader(columns, modality, None)
    found = moments(lambda: (reader.numbers(arrays) for arrays in rows.batches(columns)))
    if found is None:
        raise _no_rows(rows, columns, modality, None, "Set its mean and std, or remove the modality")
    fitted = {"mean": tuple(found.mean.tolist()), "std": tuple(np.where(found.std > 0, found.std, 1.0).tolist())}
    return {key: value if getattr(modality, key) is None else getattr(modality, key) for key, value in fitted.items()}


def _fit_tokens(
    modality: TextModality, rows: Rows, columns: tuple[str, ...], class_names: tuple[str, ...] | None, max_vocabulary: int
) -> dict[str, Any]:
    """Return the field ``vocabulary`` (words, the most frequent first), ``merges`` (of subwords) or ``alphabet`` (characters,
    sorted)."""
    if modality.unit == "subword":
        found = chain.from_iterable(read_names(rows, columns, modality, class_names))
        first = next(found, None)
        if first is None:
            raise _no_rows(rows, columns, modality, class_names, "Set its merges, or remove the modality")
        normal = (normalised(text, lowercase=modality.lowercase) for text in chain([first], found))
        return {"merges": subwords.learn(normal, max_vocabulary)}
    counts: Counter[str] = Counter()
    for texts in read_names(rows, columns, modality, class_names):
        counts.update({token for text in texts for token in _tokens(modality, text)})
    for reserved in (" ", "\0", UNKNOWN_CHARACTER) if modality.unit == "character" else ():
        counts.pop(reserved, None)
    common = {token: count for token, count in counts.items() if count >= MIN_ROWS} or counts
    if not common:
        raise _no_rows(rows, columns, modality, class_names, "Set its alphabet or vocabulary, or remove the modality")
    if modality.unit == "word":
        return {"vocabulary": tuple(sorted(common, key=lambda word: (-common[word], word))[:max_vocabulary])}
    return {"alphabet": " " + "".join(sorted(common)) + UNKNOWN_CHARACTER}


def _tokens(modality: TextModality, text: str) -> list[str]:
    return tokenize(text, modality.unit, modality.lowercase, modality.segmentation)


def _completed(modality: Modality, encoders: Encoders) -> Modality:
    """Return the modality with what needs no row.

    These are the name and the size of a frozen encoder's features, and the rule that splits words by Unicode's properties,
    unless the configuration names a rule.
    """
    if isinstance(modality, EncodedModality):
        files = encoders[modality.name].files
        return EncodedModality.model_validate({**modality.model_dump(), "encoder": files.name, "size": files.size})
    if not isinstance(modality, TextModality) or modality.unit != "word" or "segmentation" in modality.model_fields_set:
        return modality
    return TextModality.model_validate({**modality.model_dump(), "segmentation": "unicode"})


def _fit_classes(
    modality: Modality, rows: Rows, columns: tuple[str, ...], class_names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the classes of the training rows: in the order of ``class_names``, else sorted."""
    found = {text.strip() for texts in read_names(rows, columns, modality, class_names) for text in texts}
    if not found:
        raise _no_rows(rows, columns, modality, class_names, "Set its classes, or remove the modality")
    if len(found) < 2:
        raise DataError(
            f"{rows.file}: column {columns[0]!r} has 1 class of {modality.name} in the training rows, {found.pop()!r}. "
            "At least 2 are needed. Set the classes, or remove the modality"
        )
    return tuple(sorted(found)) if class_names is None else tuple(name for name in class_names if name.strip() in found)


def _no_rows(
    rows: Rows, columns: tuple[str, ...], modality: Modality, class_names: tuple[str, ...] | None, remedy: str
) -> DataError:
    reasons = describe_absence(rows, columns, modality, class_names)
    return DataError(f"{rows.file}: no training row has {modality.name}; column {', '.join(columns)}, {reasons}. {remedy}")
