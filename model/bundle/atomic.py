"""Atomic replacement of a folder: every reader sees the old folder or the new one, never a gap between them."""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100  # relative paths start at the working directory
_RENAME_EXCHANGE = 2
SWAP_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP})
"""Error numbers of systems and file systems that cannot swap two names."""


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder ``new`` to ``path``. A folder that was at ``path`` gets the name of ``new``.

    The replacement is atomic. On file systems that cannot swap two names (some network file systems) it takes two renames, and
    for a moment there is no folder at ``path``.

    Args:
        new: a folder on the same file system as ``path``.

    Raises:
        OSError: the folder could not be renamed.
    """
    if not path.exists():
        new.rename(path)
        return
    try:
        swap_names(new, path)
    except OSError as error:
        if error.errno not in SWAP_UNSUPPORTED:
            raise
        retired = new.with_name(f"{new.name}-old")
        path.rename(retired)
        new.rename(path)
        retired.rename(new)


def swap_names(first: Path, second: Path) -> None:
    """Swap the names of two files or folders in one system call: Linux's renameat2, which Python does not offer.

    Raises:
        OSError: the call failed; ENOSYS on systems without it.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "no renameat2") from error
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))
