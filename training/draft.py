"""The first draft of a configuration, from what a Parquet file holds."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.modality import RESERVED_NAMES
from training.guess import Guess
from training.sources import DataError

MOST_MODALITIES = 8
HELD_OUT = 0.1
_STEPS = 2000  # of the joint stage; the two others take a fourth and a half of its epochs
_BATCH = 128


def name_modalities(guesses: Sequence[Guess]) -> dict[str, Guess]:
    """A name of its own for each guess that is a modality."""
    named: dict[str, Guess] = {}
    for guess in guesses:
        if guess.role in ("label", "split", "skipped"):
            continue
        told = guess.columns[0] if len(guess.columns) == 1 else {"vector": "numbers"}.get(guess.role, "attributes")
        plain = re.sub(r"[^a-z0-9]+", "_", told.lower()).strip("_")[:48]
        plain = plain if plain[:1].isalpha() and plain not in RESERVED_NAMES else f"{guess.role}_{plain}".rstrip("_")
        name, number = plain, 1
        while name in named:
            number += 1
            name = f"{plain}_{number}"
        named[name] = guess
    return named


def draft(file: Path, rows: int, guesses: Sequence[Guess]) -> str:
    """The text of a TOML file that reads ``file``.

    Raises:
        DataError: fewer than two columns can be modalities.
    """
    named = name_modalities(guesses)
    if len(named) < 2:
        found = ", ".join(f"{', '.join(g.columns)} ({g.role}: {g.note})" for g in guesses)
        raise DataError(f"{file}: has {len(named)} columns that can be modalities, two are the least. Found: {found}")
    kept, others = dict(list(named.items())[:MOST_MODALITIES]), list(named)[MOST_MODALITIES:]
    lines = [
        f"# Drafted from {_plain(file.name)}, {rows:,} rows. Look through it: kinds and sizes are guesses.",
        "#   python -m training check <this file>",
        "#   python -m training fit <this file>",
        "",
        f"name = {_toml(re.sub(r'[^a-z0-9_-]+', '-', file.stem.lower()).strip('-_')[:48] or 'own')}",
        f"threads = {len(os.sched_getaffinity(0))}           # fewer where others use the machine: threads wait for each other",
        "",
    ]
    lines += [
        "# Each modality may say weight = 1.0, its weight in the objective. Left out, modalities weigh by their size.",
        "",
    ]
    for name, guess in kept.items():
        lines += _modality(name, guess)
    if others:
        lines += [f"# Left out, {MOST_MODALITIES} modalities are the most: {', '.join(others)}.", ""]
    lines += _data(file, kept, guesses)
    batch = min(_BATCH, max(8, rows // 10))
    epochs = min(100, max(4, _STEPS * batch // max(1, rows)))
    lines += [
        "[network]",
        "latent = 32           # dimensions of an embedding",
        "",
        "[objective]",
        "beta = 1.0            # higher: smoother embeddings that generate better and tell less apart",
        "",
        "[joint]",
        f"epochs = {epochs}",
        f"batch_size = {batch}",
        "",
        "[refiner]",
        f"epochs = {max(1, epochs // 4)}",
        f"batch_size = {batch}",
        "steps = 2             # of refinement",
        "",
        "[align]",
        f"epochs = {max(2, epochs // 2)}",
        f"batch_size = {batch}",
    ]
    return "\n".join(lines) + "\n"


def _modality(name: str, guess: Guess) -> list[str]:
    learned = {"text": "its tokens", "categorical": "the classes", "vector": "mean and std"}.get(guess.role)
    lines = [
        f"# {_plain(', '.join(guess.columns))}: {_plain(guess.note)}; absent in {guess.nulls:,} rows",
        "[[modalities]]",
        f"name = {_toml(name)}",
        f'kind = "{guess.role}"',
        *(f"{key} = {_toml(value)}" for key, value in guess.fields.items()),
    ]
    if learned:
        lines.append(f"# {learned} will be learned from the training rows")
    if guess.role == "text" and guess.fields["unit"] == "word":
        lines.append("# a word that training has not seen twice is read as one and the same unknown word")
    return [*lines, ""]


def _data(file: Path, named: dict[str, Guess], guesses: Sequence[Guess]) -> list[str]:
    label = next((guess for guess in guesses if guess.role == "label"), None)
    split = next((guess for guess in guesses if guess.role == "split"), None)
    columns = ", ".join(f"{n} = {_toml(g.columns[0] if len(g.columns) == 1 else list(g.columns))}" for n, g in named.items())
    lines = [
        "[data]",
        f"folder = {_toml(str(file.parent))}",
        'pairing = "row"       # what stands in one row belongs together',
        'bad_values = "absent" # what cannot be read counts as absent, with a warning; "fail" ends the run',
        "",
        "[[data.sources]]",
        f"train = {_toml(file.name)}",
        f"split = {_toml(split.columns[0])}" if split else f"held_out = {HELD_OUT}        # share of the rows to test on",
        f"columns = {{ {columns} }}",
        *(
            [f"label = {_toml(label.columns[0])}  # of the classes that embeddings are judged by; never an input"]
            if label
            else []
        ),
        'licence = "not stated"  # of the data, and so of the weights',
        "",
    ]
    skipped = [f"#   {_plain(', '.join(g.columns))}: {_plain(g.note)}" for g in guesses if g.role == "skipped"]
    return [*lines, *(["# Columns that are not used:", *skipped, ""] if skipped else [])]


def _plain(text: str) -> str:
    """Fit for a comment, which ends with its line and knows no control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", text)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
