"""What a configuration's data hold, told before any training: who has what, what cannot be read, what does not fit."""

import logging
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from model.modality import TextModality
from training import data
from training.columns import columns_of
from training.config import Config
from training.data import Dataset
from training.sources import Split

SHOWN = 5
"""Rows told of each column."""
_SUBSETS = 16


def check(config: Config, folder: Path | None, console: Console) -> bool:
    """Read all rows of both splits and tell what they hold.

    Returns:
        whether ``fit`` would begin.

    Raises:
        DataError: what no setting mends.
    """
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"bad_values": "absent"})})
    stops = False
    for split in ("train", "test"):
        found = _load(lenient, split, folder)
        faults = _show(config, found, split, console)
        stops = stops or (faults and config.data.bad_values == "fail")
        if split == "train":
            console.print(subsets_table(found))
        for text in _unknown_words(found):
            console.print(f"{split}: {text}")
    return not stops


def subsets_table(rows: Dataset) -> Table:
    """How many rows have which modalities."""
    table = Table(title=f"{len(rows):,} training rows have", title_justify="left")
    table.add_column("modalities")
    table.add_column("rows", justify="right")
    counts = list(rows.subsets().items())
    for names, count in counts[:_SUBSETS]:
        table.add_row(" + ".join(names), f"{count:,}")
    if len(counts) > _SUBSETS:
        table.add_row(f"{len(counts) - _SUBSETS} other subsets", f"{sum(count for _, count in counts[_SUBSETS:]):,}")
    return table


def _load(config: Config, split: Split, folder: Path | None) -> Dataset:
    log = logging.getLogger("training")
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings are told here, in full
    try:
        return data.load(config, split, folder)
    finally:
        log.setLevel(level)


def _show(config: Config, rows: Dataset, split: Split, console: Console) -> bool:
    table = Table(title=f"{split}: {', '.join(f'{s.file} ({s.rows:,} rows)' for s in rows.sources)}", title_justify="left")
    for head in ("modality", "kind", "columns", "present", "absent", "blank", "unreadable"):
        table.add_column(head, justify="left" if head in ("modality", "kind", "columns") else "right")
    of = {name: columns_of(columns) for source in config.data.sources for name, columns in source.columns.items()}
    for modality in rows.modalities:
        column = rows.columns[modality.name]
        present = int(column.present.sum())
        absent = len(column.present) - present - column.blank - len(column.faults)
        shown = ", ".join(of[modality.name][:3]) + (f" and {len(of[modality.name]) - 3} more" if of[modality.name][3:] else "")
        counts = [present, max(0, absent), column.blank, len(column.faults)]
        table.add_row(modality.name, modality.kind, shown, *(f"{count:,}" for count in counts))
    console.print(table)
    faulty = False
    for name, column in rows.columns.items():
        for row, reason in column.faults[:SHOWN]:
            console.print(f"{split}: row {row}: column {', '.join(of[name])} holds no {name}: {reason}", markup=False)
        faulty = faulty or bool(column.faults)
    for file, numbers in rows.left_out.items():
        if len(numbers):
            console.print(f"{split}: {len(numbers)} rows of {file} hold no modality at all: {numbers[:SHOWN].tolist()}")
            faulty = True
    return faulty


def _unknown_words(rows: Dataset) -> list[str]:
    """Texts whose tokens are often unknown."""
    told = []
    for modality in rows.modalities:
        if isinstance(modality, TextModality) and modality.unknown_token is not None:
            tokens = rows.columns[modality.name].values
            share = int(np.count_nonzero(tokens == modality.unknown_token)) / max(1, int(np.count_nonzero(tokens)))
            told.append(f"{modality.name}: {modality.categories:,} tokens; {share:.1%} of the {modality.unit}s are unknown")
    return told
