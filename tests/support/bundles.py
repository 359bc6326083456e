"""Copies of bundles with other names, versions or damage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord.model import bundle


def write_copy(path: Path, original: Path | None = None, *, more: Sequence[Path] = (), **facts: Any) -> bundle.Bundle:
    """Write a copy of a bundle atomically, with some fields of the manifest changed.

    Args:
        path: folder of the copy.
        original: folder of the bundle to copy. None: the default built-in bundle.
        more: files that the copy has in addition.
        facts: fields of the manifest and their new values, such as ``name`` or ``version``.
    """
    source = bundle.read(original or bundle.builtin(bundle.DEFAULT_BUNDLE))
    unchanged = {name: value for name, value in source.manifest if name not in {"format", "files"}}
    files = [*(source.path / name for name in source.manifest.files), *more]
    return bundle.write(path, {**unchanged, **facts}, files, "# A copy\n")


def cut_short(path: Path, file: str = bundle.WEIGHTS, size: int = 1000) -> None:
    """Truncate a file of a bundle to ``size`` bytes, as an interrupted copy would."""
    with (path / file).open("r+b") as stream:
        stream.truncate(size)
