"""Limits of the machine: the memory that a process has used, and a full disk."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from concord.training.errors import RunError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of mallopt, from malloc.h. The context below restores their defaults, 65536 and 128 KiB."""
_PROCESSOR = Path("/proc/cpuinfo")
_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of processors that compute with bfloat16, on x86 and on ARM."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, from its start on."""
    # Not getrusage: Linux keeps its ru_maxrss over exec, so it can be that of the program that started this one.
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024


def bfloat16_flags() -> list[str]:
    """Return the flags of this machine's processor by which it computes with bfloat16 itself. Empty: it would emulate it."""
    content = _PROCESSOR.read_text(encoding="utf-8", errors="replace") if _PROCESSOR.exists() else ""
    return sorted(_BFLOAT16 & set(content.split()))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Make the C library reuse freed memory of large tensors, and return it to the system at the end of the context.

    Every training step allocates and frees the same large tensors. By default each of them is new memory, whose pages the
    system provides one by one: a fifth of the time of a step in a virtual machine. No effect without glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, 65536)
        library.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)


@contextmanager
def full_disk_reported(*folders: Path) -> Iterator[None]:
    """Report a full disk with its folder and free space.

    Args:
        folders: where the body of the context writes. They need not exist.

    Raises:
        RunError: the body failed because a disk is full, a quota is used up, or a file would exceed a limit of the process.
    """
    try:
        yield
    except Exception as error:
        # Libraries raise different classes, with the error of the operating system as their context or in their text.
        reason = next((text for cause in _causes(error) if (text := _full_disk(cause))), None)
        if reason is None:
            raise
        free = " and ".join(f"{_free_megabytes(folder):,} MB free in {folder}" for folder in folders)
        raise RunError(f"{reason}: {free}. Make space, then run the same command: what was saved before is intact") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _full_disk(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno).lower()
    return next((os.strerror(number).lower() for number in _FULL if f"(os error {number})" in str(error)), None)  # of Rust


def _free_megabytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20
