"""Parsed columns on disk, so that a later run on the same file does not decode its pictures again.

An entry belongs to the bytes of a file, the rows of a split, and everything that parsing depends on. A changed file has another
entry. Nothing removes old ones: the folder may be deleted at any time.
"""

import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa

from concord.model.modality import AudioModality, EncodedModality, ImageModality, Modality
from concord.training.data.columns import Column, Rows

_FORMAT = 1
_log = logging.getLogger(__name__)


def cached(
    folder: Path | None,
    digest: str | None,
    rows: Rows,
    columns: Sequence[str],
    modality: Modality,
    class_names: tuple[str, ...] | None,
    parse: Callable[[], Column],
    *,
    is_test: bool,
) -> Column:
    """Return a parsed column: from the cache if it is there, else from ``parse``, and then it is stored.

    The values of a stored column are memory-mapped and must not be changed. Not stored: columns with values that cannot be
    parsed, and pictures or sounds that lie in separate files, whose content may change.

    Args:
        folder: of the cache. None: there is none.
        digest: hash of the file. None: the rows are not those of a single file, and are not stored.
        parse: returns the column. The other arguments are those that its result depends on.
    """
    if folder is None or digest is None or isinstance(modality, EncodedModality):  # features are stored by themselves
        return parse()
    facts = {
        "format": _FORMAT,
        "versions": [importlib.metadata.version("concord-mvae"), PIL.__version__, *_sound_versions(modality)],
        "file": digest,
        "rows": hashlib.sha256(rows.numbers.tobytes()).hexdigest(),
        "columns": list(columns),
        "modality": modality.model_dump(mode="json"),
        "class_names": class_names,
        "is_test": is_test,
    }
    entry = folder / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    if (stored := _load(entry, len(rows))) is not None:
        return stored
    column = parse()
    if not column.errors and not (isinstance(modality, ImageModality | AudioModality) and _has_paths(rows, columns[0])):
        _save(entry, column)
    return column


def _sound_versions(modality: Modality) -> list[str]:
    """Versions of the libraries that decode and resample sounds, if the modality is one."""
    packages = ("soundfile", "soxr") if isinstance(modality, AudioModality) else ()
    return [importlib.metadata.version(package) for package in packages]


def _has_paths(rows: Rows, column: str) -> bool:
    """Whether pictures or sounds of a column may lie in separate files: strings, or structs without bytes."""
    for (array,) in rows.batches([column]):
        if pa.types.is_struct(array.type):
            if "bytes" in array.type.names and array.filter(array.is_valid()).field("bytes").null_count:
                return True
        elif not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type) or pa.types.is_nested(array.type)):
            return True
    return False


def _load(entry: Path, rows: int) -> Column | None:
    try:
        facts = json.loads((entry / "column.json").read_text(encoding="utf-8"))
        values = np.load(entry / "values.npy", mmap_mode="r", allow_pickle=False)
        present = np.load(entry / "present.npy", allow_pickle=False)
        starts = np.load(entry / "starts.npy", allow_pickle=False) if facts["has_starts"] else None
        if len(present) != rows:
            raise ValueError("another number of rows")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: damaged (%s), the column is parsed again", entry, error)
        return None
    return Column(values, present, starts, [], facts["blank"], Counter(facts["unseen"]), tuple(facts["notes"]))


def _save(entry: Path, column: Column) -> None:
    """Store a column. The entry appears when it is complete. A full disk or a read-only folder is no error."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=entry.parent))
    except OSError as error:
        _log.warning("%s: cannot be written (%s), parsed values are not kept", entry.parent, error.strerror)
        return
    try:
        np.save(partial / "values.npy", column.values, allow_pickle=False)
        np.save(partial / "present.npy", column.present, allow_pickle=False)
        if column.starts is not None:
            np.save(partial / "starts.npy", column.starts, allow_pickle=False)
        facts = {
            "has_starts": column.starts is not None,
            "blank": column.blank,
            "unseen": dict(column.unseen),
            "notes": list(column.notes),
        }
        (partial / "column.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        partial.replace(entry)
    except OSError as error:
        _log.warning("%s: cannot be written (%s), parsed values are not kept", entry, error.strerror)
        shutil.rmtree(partial, ignore_errors=True)
