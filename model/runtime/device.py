"""The device that graphs run on: options of ONNX Runtime, and the kinds of its errors."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from concord.model.bundle import BundleError

DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$"
MAX_THREADS = 16
"""Threads of one operator if their number is not set. Graphs of this size are not faster with more."""
SPARE_THREADS = 64
"""Threads of a container that are left to other parts of the process."""
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "9.0", "12.0")
"""Of the GPUs that the pinned ONNX Runtime has kernels for: it holds no intermediate code for others."""
MIN_DRIVER = 580
"""Version of NVIDIA's driver that CUDA 13 needs."""
GOLDEN_TOLERANCE = 1e-3
TF32_TOLERANCE = 5e-3
"""With 10 bits of mantissa, golden examples of the built-in bundles differ by up to 2e-3."""

ERRORS = 3
"""Severity from which ONNX Runtime logs on a GPU. Its warnings there are lines of text between those of a JSON log."""

ErrorKind = Literal["memory", "lost", "other"]
"""Device memory ran out; the device is lost for this process; any other error."""

_PIDS = Path("/sys/fs/cgroup")
_DEVICES = Path("/dev")
_MEMORY = re.compile(
    r"Available memory of \d+ is smaller than requested|Failed to allocate|out of memory|CUDA failure 2:"
    r"|CUBLAS_STATUS_ALLOC_FAILED|ALLOCATION_FAILED"
)
# Errors of CUDA after which every further call of the process fails, by number; texts of cuDNN and cuBLAS without a number.
_LOST_CODES = (46, 100, 101, 201, 214, 220, 226, 304, 700, 702, 709, 710, *range(713, 720), 721, 999)
_LOST = re.compile(rf"CUDA failure ({'|'.join(map(str, _LOST_CODES))}):|EXECUTION_FAILED|launch failure")


class DeviceLostError(Exception):
    """No call of this process to the GPU succeeds any more. CUDA requires that the process ends and starts again."""


class CudaError(BundleError):
    """CUDA is installed but does not start."""


@dataclass(frozen=True)
class Device:
    """A CPU or one GPU.

    Args:
        kind: cpu or cuda.
        index: number of the GPU among those that the process sees.
        memory_mb: limit of the memory that each graph allocates on a GPU, in MiB. 0: none.
        tf32: multiply with 10 bits of mantissa on a GPU.
        graphs: run graphs on a GPU as CUDA graphs where that is possible.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0
    memory_mb: int = 0
    tf32: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.index else self.kind

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU, where absent modalities can be skipped and time grows with the number of rows."""
        return self.kind == "cpu"

    @property
    def tolerance(self) -> float:
        """Largest relative difference from golden examples, see ``Runtime.replay_golden``."""
        return TF32_TOLERANCE if self.tf32 and not self.is_cpu else GOLDEN_TOLERANCE

    @property
    def providers(self) -> list[Any]:
        """Execution providers of ONNX Runtime, with options. The first one is the device's."""
        return self._providers()

    @property
    def capturing_providers(self) -> list[Any]:
        """``providers`` for a session whose runs are captured as CUDA graphs."""
        return self._providers(enable_cuda_graph="1")

    def _providers(self, **more: str) -> list[Any]:
        if self.is_cpu:
            return ["CPUExecutionProvider"]
        options = {
            "device_id": str(self.index),
            "use_tf32": str(int(self.tf32)),  # ONNX Runtime's default is 1, with which golden examples differ
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE times every algorithm at each new batch size
            "arena_extend_strategy": "kSameAsRequested",
            "do_copy_in_default_stream": "1",
            **({"gpu_mem_limit": str(self.memory_mb << 20)} if self.memory_mb else {}),
            **more,
        }
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]

    def threads(self, requested: int, sessions: int) -> int:
        """Return the number of CPU threads of one operator.

        A session starts its threads when it opens. Where a container has no more threads, it waits for them for ever.

        Args:
            requested: 0: one for each core that this process may use, at most ``MAX_THREADS``; one on a GPU.
            sessions: number of sessions to open.

        Raises:
            BundleError: the container's limit of threads is lower than ``requested`` needs.
        """
        left = _threads_left()
        if requested:
            if left is not None and sessions * (requested - 1) > left:
                raise BundleError(
                    f"{requested} threads for each of {sessions} graphs are more than the {left} that this container may still "
                    "start (pids.max). Lower CONCORD_THREADS, or raise the container's pids limit"
                )
            return requested
        cores = min(len(os.sched_getaffinity(0)), MAX_THREADS) if self.is_cpu else 1
        return cores if left is None else max(1, min(cores, 1 + left // sessions))


def choose_device(name: str, *, memory_mb: int = 0, tf32: bool = False, graphs: bool = False) -> Device:
    """Return the device of a name: cpu, cuda, cuda:N, or auto, which is CUDA if it is installed, else the CPU.

    Raises:
        BundleError: the name is of no device, or this installation of ONNX Runtime has no CUDA.
    """
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise BundleError(f"device is {name!r}: it is auto, cpu, cuda, or cuda:N for the GPU with number N")
    if name == "cpu":
        return Device()
    if cuda_is_installed():
        with _stdout_to_stderr():
            onnxruntime.preload_dlls()  # CUDA and cuDNN are installed as wheels
        onnxruntime.set_default_logger_severity(ERRORS)
        return Device("cuda", int(name.partition(":")[2] or 0), memory_mb, tf32, graphs)
    if name == "auto":
        return Device()
    available = onnxruntime.get_available_providers()
    raise BundleError(
        f"device is {name}, but this installation of ONNX Runtime only has {available}. Install the gpu extra, or choose "
        "device cpu or auto"
    )


def cuda_is_installed() -> bool:
    """Return whether this is a build of ONNX Runtime for CUDA. There may be no GPU."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def gpu_is_visible() -> bool:
    """Return whether NVIDIA's driver shows a GPU to this process. False where the driver has no device files, as in WSL."""
    return any(_DEVICES.glob("nvidia[0-9]*"))


def classify(error: BaseException) -> ErrorKind:
    """Return the kind of an error of a graph. ONNX Runtime has one class for all of them, so the message is matched."""
    message = str(error)
    if isinstance(error, MemoryError) or _MEMORY.search(message):
        return "memory"
    return "lost" if _LOST.search(message) else "other"


def _threads_left() -> int | None:
    """Return how many threads this container may still start, less some to spare. None: there is no limit."""
    try:
        limit, current = ((_PIDS / name).read_text().strip() for name in ("pids.max", "pids.current"))
    except OSError:  # no cgroup of version 2
        return None
    return None if limit == "max" else max(0, int(limit) - int(current) - SPARE_THREADS)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """ONNX Runtime prints what it could not load, and standard output may be a document or a log."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
