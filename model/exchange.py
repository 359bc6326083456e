"""A folder put in the place of another in one step: whoever looks finds the old one or the new one, at every moment."""

import ctypes
import errno
import os
from pathlib import Path

NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP})  # what systems say that cannot


def put_in_place(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``; what had it, if anything, gets the name of ``new``. Both are on one file system.

    Where the file system cannot exchange two names (some network file systems), a moment is left without either.
    """
    if not path.exists():
        new.rename(path)
        return
    try:
        exchange(new, path)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        retired = new.with_name(f"{new.name}-old")
        path.rename(retired)
        new.rename(path)
        retired.rename(new)


def exchange(one: Path, other: Path) -> None:
    """Two names change places in one system call, Linux's renameat2, which Python does not offer.

    Raises:
        OSError: as of the call; ENOSYS on other systems.
    """
    here, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "no renameat2") from error
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange_flag) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
