"""Bundles that differ from another one in a few facts."""

from pathlib import Path
from typing import Any

from model import bundle


def write_copy(place: Path, original: Path | None = None, **facts: Any) -> bundle.Bundle:
    """A bundle under another name or version, put in place in one step.

    Args:
        original: the built-in one when left out.
    """
    source = bundle.read(original or bundle.builtin(bundle.DEFAULT_BUNDLE))
    kept = {name: value for name, value in source.manifest if name not in {"format", "files"}}
    files = [source.path / name for name in source.manifest.files]
    return bundle.write(place, {**kept, **facts}, files, "# A copy\n")


def cut_short(place: Path, file: str = bundle.WEIGHTS, size: int = 1000) -> None:
    """As a copy that broke off leaves it."""
    with (place / file).open("r+b") as stream:
        stream.truncate(size)
