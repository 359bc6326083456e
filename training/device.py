"""The device that a command computes on, and what depends on it: precision, random numbers, transfer of rows."""

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from concord.training.config import Config
from concord.training.data.dataset import Batch
from concord.training.errors import ConfigError
from concord.training.machine import bfloat16_flags

PREFETCHED_BATCHES = 2
"""Batches that wait on a device other than the CPU for their step."""
_SAMPLERS = frozenset({torch.randn, torch.rand, torch.randint, torch.randperm, torch.multinomial})
_CREATORS = frozenset({torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.tensor})


def resolve_device(name: str) -> torch.device:
    """Return the device with a name of the configuration.

    Under torchrun, ``auto`` and ``cuda`` are the GPU with the number ``LOCAL_RANK``.

    Raises:
        ConfigError: this machine or this build of PyTorch does not have the device.
    """
    kind, _, number = name.partition(":")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(device for device, is_found in found.items() if is_found)
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f'device is "{name}", but {_why_no_cuda()}')
        if number and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(f'device is "{name}", but under torchrun each process has its own GPU: set it to "cuda"')
        index = int(number) if number else local_rank
        if index >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f'device is "{name}" and this process needs GPU {index}, but PyTorch finds {count}, numbered from 0: name '
                "another one, or start at most one process for each"
            )
        return torch.device("cuda", index)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f'device is "{name}", but PyTorch finds no Metal device here: set device to "auto" or "cpu"')
    return torch.device(kind)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA: install a build with it "
            '(https://pytorch.org/get-started/locally), or set device to "auto" or "cpu"'
        )
    return (
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU: check nvidia-smi, the driver and "
        'CUDA_VISIBLE_DEVICES, or set device to "auto" or "cpu"'
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes with bfloat16 itself. Where it is emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(bfloat16_flags())


@contextmanager
def precision(config: Config, device: torch.device) -> Iterator[None]:
    """Compute products in the precision of the configuration for the duration of the context, if the device has it."""
    if config.precision != "bfloat16" or not has_bfloat16(device):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield


def describe(config: Config, device: torch.device) -> str:
    """Return device and precision in words."""
    name = f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
    if config.precision != "bfloat16":
        return f"device {name}, products in float32"
    if has_bfloat16(device):
        return f"device {name}, products in bfloat16"
    return f"device {name}, products in float32: it has no instructions for bfloat16, which would be emulated and slower"


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Iterate over batches on a device.

    On a device other than the CPU a thread reads and copies them ahead, from pinned memory, so that the device does not wait.
    """
    if device.type == "cpu":
        yield from batches
        return
    waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                break

    def read() -> None:
        try:
            for batch in batches:
                if stopped.is_set():
                    return
                put(batch.to(device))
            put(None)
        except BaseException as error:  # raised again where the batch is used
            put(error)

    thread = threading.Thread(target=read, name="concord-rows", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


class EvaluationDevice(TorchFunctionMode):
    """Context in which code that names no device computes on one: metrics are written once, for every device.

    Tensors are created on the device. Random numbers are sampled on the CPU and copied, so they are the same on every device.
    Arrays of NumPy and lists are read from tensors of the device. Batches come from ``Dataset.to``.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.device.type == "cpu":
            return func(*args, **kwargs)
        if func in _SAMPLERS:
            weights = (args[0].cpu(), *args[1:]) if func is torch.multinomial else args
            return func(*weights, **kwargs).to(self.device)
        if func in (torch.Tensor.numpy, torch.Tensor.tolist):
            return func(args[0].cpu())
        result = func(*args, **kwargs)
        return result.to(self.device) if func in _CREATORS and "device" not in kwargs else result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device is full."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
