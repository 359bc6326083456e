"""Arrays for parsed values: in memory, or memory-mapped from an unnamed file when they exceed a limit. Their statistics."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from numpy.typing import DTypeLike

MAX_BYTES = 4 << 30
"""Default size up to which an array is kept in memory."""
_CHUNK = 4096
"""Rows per step."""
_SMALL = 2.0**-64
"""Factor with which a sum of any number of rows does not overflow."""
_MAX_EXPONENT = 400
"""Deviations between 2 ** -400 and 2 ** 400 have squares in the range of float64."""


def allocate(shape: Sequence[int], dtype: DTypeLike, max_bytes: int = MAX_BYTES) -> Shaped[np.ndarray, "..."]:
    """Return an array of zeros.

    Above ``max_bytes`` the array is mapped from an unnamed file in ``TMPDIR``. The file disappears with the process, also after
    a crash. The operating system caches the pages that are read often.

    Raises:
        OSError: the disk has too little free space.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= max_bytes:
        return np.zeros(tuple(shape), dtype)
    with tempfile.TemporaryFile(prefix="concord-") as file:
        try:
            # Reserve the space now: writing to a mapped page of a full disk kills the process with SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(
                error.errno,
                f"{folder}: cannot reserve {size:,} bytes for parsed values ({error.strerror}). Set TMPDIR to a disk with "
                "enough free space, or raise data.memory_mb",
            ) from error
        return np.asarray(np.memmap(file, dtype=dtype, mode="r+", shape=tuple(shape)))


def copy_rows(
    values: Shaped[np.ndarray, "row ..."], rows: Int64[np.ndarray, " chosen"], max_bytes: int = MAX_BYTES
) -> Shaped[np.ndarray, "chosen ..."]:
    """Return ``values[rows]`` in a new array from ``allocate``, copied in chunks."""
    copy = allocate((len(rows), *values.shape[1:]), values.dtype, max_bytes)
    for start in range(0, len(rows), _CHUNK):
        copy[start : start + _CHUNK] = values[rows[start : start + _CHUNK]]
    return copy


@dataclass(frozen=True)
class Moments:
    """Statistics of the rows of a matrix, each (size,). ``std`` is 0 where all rows have the same number."""

    mean: Float64[np.ndarray, " size"]
    std: Float64[np.ndarray, " size"]
    rows: int


def moments(read: Callable[[], Iterable[Float64[np.ndarray, "row size"]]]) -> Moments | None:
    """Mean and standard deviation over the rows, in double precision, with memory for a few thousand rows.

    Args:
        read: returns the matrix in parts, the same in each pass. Any finite numbers.

    Returns:
        None if there is no row.
    """
    rows, total = 0, np.zeros(())
    low, high = np.array(np.inf), np.array(-np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for chunk in _chunks(read()):
            rows += len(chunk)
            low, high = np.minimum(low, chunk.min(axis=0)), np.maximum(high, chunk.max(axis=0))
            total = total + chunk.sum(axis=0)
    if not rows:
        return None
    is_constant = low == high
    mean = total / rows
    if not np.isfinite(mean).all():  # the sum leaves the range of float64, which the mean does not
        small_mean = sum((chunk * _SMALL).sum(axis=0) for chunk in _chunks(read())) / rows
        mean = np.where(np.isfinite(mean), mean, small_mean / _SMALL)
    mean = np.where(is_constant, low, mean)
    # Squares of very large or small deviations would leave the range of float64. Powers of two scale without rounding.
    exponents = np.frexp(high / 2 - low / 2)[1]
    scale = np.where(np.abs(exponents) < _MAX_EXPONENT, 1.0, np.ldexp(1.0, np.clip(-exponents, -1000, 1000)))
    squares = np.zeros(())
    for chunk in _chunks(read()):
        chunk *= scale  # noqa: PLW2901 - in place, as the chunk may be large
        chunk -= mean * scale  # noqa: PLW2901
        squares = squares + np.square(chunk, out=chunk).sum(axis=0)
    variance = squares / rows
    return Moments(mean, np.where(is_constant, 0.0, np.sqrt(variance) / scale), rows)


def _chunks(parts: Iterable[Float64[np.ndarray, "row size"]]) -> Iterator[Float64[np.ndarray, "row size"]]:
    """Chunks of ``_CHUNK`` rows, the last one smaller: sums do not depend on the size of the parts.

    The chunks share their memory: use each before the next one.
    """
    buffer, filled = np.empty((0, 0)), 0
    for part in parts:
        if not len(buffer):
            buffer = np.empty((_CHUNK, part.shape[1]))
        start = 0
        while start < len(part):
            rows = min(len(part) - start, _CHUNK - filled)
            buffer[filled : filled + rows] = part[start : start + rows]
            start, filled = start + rows, filled + rows
            if filled == _CHUNK:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
