"""The lock of a run's folder: one command at a time writes there."""

import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import TextIO

from concord.training.checkpoint import LOCK_FILE
from concord.training.errors import RunError

_log = logging.getLogger(__name__)


class RunLock:
    """The lock of a run's folder. As a context it is released at the end.

    The locked file stays in the folder. The operating system ends the lock with the process, however that ends.

    Args:
        path: folder of the run. Created by ``acquire``.
        activity: what the process does, for the message of another one.
    """

    def __init__(self, path: Path, activity: str) -> None:
        self._path, self._activity = path, activity
        self._stream: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock, unless this object holds it already.

        Raises:
            RunError: another process holds it.
        """
        if self._stream is not None:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        stream = (self._path / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another command is running in this folder"
            stream.close()
            raise RunError(f"{self._path}: {holder}. Wait for its end, or name another folder with --out") from None
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s: cannot be locked (%s). Do not run two commands in this folder", self._path, error.strerror)
        self._stream = stream
        stream.truncate(0)
        stream.write(f"{self._activity} is running in this folder (pid {os.getpid()})\n")
        stream.flush()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
