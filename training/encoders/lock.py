"""A lock that waits: processes that train together prepare an encoder and compute features once."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[BinaryIO]:
    """Open a file for appending, and wait until no other process has it locked. The lock ends with the context."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s: cannot be locked (%s)", file, error.strerror)
        yield stream
