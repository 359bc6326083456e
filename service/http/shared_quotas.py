"""Quotas that several processes count together, in memory that they share.

A lock of the kernel guards each quota. It costs a few microseconds, and the kernel frees it when its process is killed. A
process that is stopped keeps it. So the event loop only tries to get the lock, and a thread waits for it.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator

_SLOT = struct.Struct("<Qdd")
"""Identity, or 0 for a free slot; level; and when it was filled, in seconds on the monotonic clock of the machine."""
SLOTS = 1 << 16
"""More than one file of API keys holds. Only the slots that are used take memory."""


class QuotasFullError(ValueError):
    """More than ``SLOTS`` different quotas since the service started."""


class SharedLevels:
    """A hash table of levels. Every process of the service opens it by the same descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SLOTS * _SLOT.size)
        # The kernel's locks are of processes, not of threads. A process that has one and waits for another could look like a
        # deadlock to the kernel, so threads take them one at a time.
        self._lock = threading.RLock()

    @classmethod
    def create(cls) -> "SharedLevels":
        """An empty table, which lives as long as a process has its descriptor."""
        descriptor = os.memfd_create("concord-quotas")
        os.ftruncate(descriptor, SLOTS * _SLOT.size)
        return cls(descriptor)

    def of(self, identity: bytes, level: float, filled: float) -> "SharedLevel":
        """The level of this identity: what is there already, else this one.

        Args:
            identity: 8 bytes.

        Raises:
            QuotasFullError: every slot is taken.
        """
        number = int.from_bytes(identity, "little") or 1
        with self._lock, self._locked(SLOTS * _SLOT.size, 1):  # a byte after the table guards its free slots
            for probe in range(SLOTS):
                offset = (number + probe) % SLOTS * _SLOT.size
                found = _SLOT.unpack_from(self._memory, offset)[0]
                if not found:
                    _SLOT.pack_into(self._memory, offset, number, level, filled)
                if found in (0, number):
                    return SharedLevel(self, offset)
        raise QuotasFullError(f"{SLOTS} different quotas were read since the service started: restart it")

    @contextlib.contextmanager
    def _locked(self, offset: int, size: int, blocking: bool = True) -> Iterator[None]:
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB), size, offset)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, size, offset)

    @contextlib.contextmanager
    def locked(self, offset: int, *, blocking: bool) -> Iterator[None]:
        """The slot at this offset belongs to this thread inside this context.

        Raises:
            BlockingIOError: it belongs to another thread or process, and ``blocking`` is False.
        """
        if not self._lock.acquire(blocking=blocking):
            raise BlockingIOError
        try:
            with self._locked(offset, _SLOT.size, blocking):
                yield
        finally:
            self._lock.release()

    def read(self, offset: int) -> tuple[float, float]:
        """Level, and when it was filled."""
        _, level, filled = _SLOT.unpack_from(self._memory, offset)
        return level, filled

    def write(self, offset: int, level: float, filled: float) -> None:
        struct.pack_into("<dd", self._memory, offset + 8, level, filled)


class SharedLevel:
    """The level of one quota."""

    def __init__(self, levels: SharedLevels, offset: int) -> None:
        self._levels = levels
        self._offset = offset

    def locked(self, *, blocking: bool) -> contextlib.AbstractContextManager[None]:
        return self._levels.locked(self._offset, blocking=blocking)

    def read(self) -> tuple[float, float]:
        return self._levels.read(self._offset)

    def write(self, level: float, filled: float) -> None:
        self._levels.write(self._offset, level, filled)
