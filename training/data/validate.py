"""Validation of a configuration's data before training: which modalities rows have, which values cannot be parsed."""

import logging
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from concord.model.modality import TextModality
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.data.columns import column_names
from concord.training.data.dataset import Dataset
from concord.training.data.sources import Split

_MAX_SHOWN = 5
"""Errors printed per column, and columns or rows listed per line."""
_MAX_SUBSETS = 16
"""Subsets listed in the table."""


def validate(config: Config, folder: Path | None, console: Console) -> Dataset | None:
    """Read all rows of both splits and print what they contain.

    Returns:
        The training rows. None: ``fit`` would not start.

    Raises:
        DataError: an error that ``bad_values = "absent"`` does not tolerate.
    """
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"bad_values": "absent"})})
    training = _load(lenient, "train", folder)
    errors = [_print_split(config, training, "train", console)]
    errors.append(_print_split(config, _load(lenient, "test", folder), "test", console))
    return None if config.data.bad_values == "fail" and any(errors) else training


def _print_split(config: Config, rows: Dataset, split: Split, console: Console) -> bool:
    """Print what the rows of a split contain; return whether there are errors or rows without any modality."""
    has_errors = _print_columns(config, rows, split, console)
    for note in rows.notes if split == "train" else ():
        console.print(note, markup=False)
    if split == "train":
        console.print(subsets_table(rows))
    for line in _unknown_token_shares(rows):
        console.print(f"{split}: {line}")
    return has_errors


def subsets_table(rows: Dataset) -> Table:
    """Return a table of the number of rows with each subset of modalities."""
    table = Table(title=f"modalities of {len(rows):,} training rows", title_justify="left")
    table.add_column("modalities")
    table.add_column("rows", justify="right")
    counts = list(rows.subsets().items())
    for names, count in counts[:_MAX_SUBSETS]:
        table.add_row(" + ".join(names), f"{count:,}")
    if len(counts) > _MAX_SUBSETS:
        table.add_row(f"{len(counts) - _MAX_SUBSETS} other subsets", f"{sum(count for _, count in counts[_MAX_SUBSETS:]):,}")
    return table


def _load(config: Config, split: Split, folder: Path | None) -> Dataset:
    """Load one split without its warnings: ``_print_columns`` prints their content in full."""
    log = logging.getLogger("concord.training")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return dataset.load(config, split, folder)
    finally:
        log.setLevel(level)


def _print_columns(config: Config, rows: Dataset, split: Split, console: Console) -> bool:
    """Print a table of the modalities and the first errors; return whether there are errors or rows without any modality."""
    table = Table(title=f"{split}: {', '.join(f'{s.file} ({s.rows:,} rows)' for s in rows.sources)}", title_justify="left")
    for heading in ("modality", "kind", "columns", "present", "absent", "blank", "invalid"):
        table.add_column(heading, justify="left" if heading in ("modality", "kind", "columns") else "right")
    columns_of = {name: column_names(columns) for source in config.data.sources for name, columns in source.columns.items()}
    for modality in rows.modalities:
        column, names = rows.columns[modality.name], columns_of[modality.name]
        present = int(column.present.sum())
        absent = len(column.present) - present - column.blank - len(column.errors)  # classes that were not trained included
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        counts = [present, max(0, absent), column.blank, len(column.errors)]
        table.add_row(modality.name, modality.kind, shown, *(f"{count:,}" for count in counts))
    console.print(table)
    has_errors = False
    for name, column in rows.columns.items():
        if column.unseen:
            classes = ", ".join(f"{unseen!r} ({count:,})" for unseen, count in column.unseen.most_common(_MAX_SHOWN))
            more = f" and {len(column.unseen) - _MAX_SHOWN} more" if len(column.unseen) > _MAX_SHOWN else ""
            console.print(
                f"{split}: {column.unseen.total():,} rows have a class of {name} that no training row has, which counts as "
                f"absent: {classes}{more}",
                markup=False,
            )
        for row, reason in column.errors[:_MAX_SHOWN]:
            names = columns_of[name]
            console.print(f"{split}: row {row}, column {', '.join(names)}: invalid {name}: {reason}", markup=False)
        has_errors = has_errors or bool(column.errors)
    for file, numbers in rows.empty_rows.items():
        if len(numbers):
            console.print(f"{split}: {len(numbers)} rows of {file} have no modality: {numbers[:_MAX_SHOWN].tolist()}")
            has_errors = True
    return has_errors


def _unknown_token_shares(rows: Dataset) -> list[str]:
    """Return, for each text modality with an unknown token, the share of tokens that are unknown."""
    lines = []
    for modality in rows.modalities:
        if isinstance(modality, TextModality) and modality.unknown_token is not None:
            tokens = rows.columns[modality.name].values
            share = int(np.count_nonzero(tokens == modality.unknown_token)) / max(1, int(np.count_nonzero(tokens)))
            lines.append(f"{modality.name}: {modality.categories:,} tokens; {share:.1%} of the {modality.unit}s are unknown")
    return lines
