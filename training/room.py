"""Room for decoded values: in memory, or in a file of no name where there are more than that may hold."""

import os
import tempfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Shaped
from numpy.typing import DTypeLike

MOST_BYTES = 4 << 30
_CHUNK = 4096
"""Rows at a time."""


def room(shape: Sequence[int], dtype: DTypeLike, most_bytes: int = MOST_BYTES) -> Shaped[np.ndarray, "..."]:
    """Zeros. Beyond ``most_bytes`` they lie in a file in ``TMPDIR`` that goes with the process, however it ends, and the system
    keeps in memory what is read often.

    Raises:
        OSError: the disk has not so much left.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= most_bytes:
        return np.zeros(tuple(shape), dtype)
    with tempfile.TemporaryFile(prefix="concord-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full later would end the process without a word
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(
                error.errno,
                f"{folder} has no room for {size:,} bytes of decoded values ({error.strerror}): name a disk that has it with "
                "TMPDIR, or raise data.memory_mb",
            ) from error
        return np.asarray(np.memmap(file, dtype=dtype, mode="r+", shape=tuple(shape)))


def copy_rows(
    values: Shaped[np.ndarray, "row ..."], rows: Int64[np.ndarray, " chosen"], most_bytes: int = MOST_BYTES
) -> Shaped[np.ndarray, "chosen ..."]:
    """``values[rows]``, a part at a time, into a ``room`` of its own."""
    copy = room((len(rows), *values.shape[1:]), values.dtype, most_bytes)
    for start in range(0, len(rows), _CHUNK):
        copy[start : start + _CHUNK] = values[rows[start : start + _CHUNK]]
    return copy


def moments(
    values: Shaped[np.ndarray, "row ..."], rows: Int64[np.ndarray, " chosen"]
) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
    """Mean and standard deviation of ``values[rows]`` over the rows, a part at a time, in double precision."""
    parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    mean = sum(values[part].sum(axis=0, dtype=np.float64) for part in parts) / len(rows)
    variance = sum(np.square(values[part].astype(np.float64) - mean).sum(axis=0) for part in parts) / len(rows)
    return np.asarray(mean), np.sqrt(variance)
