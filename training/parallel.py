"""One batch shared: between the processes that torchrun started, and between the passes of one process (accumulation).

Losses are means over rows, and noise is drawn for the whole batch, of which each share takes its rows: how a batch is shared
changes what training computes by rounding alone.
"""

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, distributed

from training.checkpoint import RunError
from training.config import Config, ConfigError

STAGES = ("joint", "refiner", "align", "refresh", "flow")


class Noise:
    """The random numbers of one step for some rows of its batch, drawn for all of them.

    Args:
        rows: of the whole batch.
        share: the rows asked for. None: all.
    """

    def __init__(self, seed: int, rows: int, share: slice | None = None) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = rows
        self._share = share or slice(0, rows)

    def normal(self, *shape: int) -> Float[Tensor, "row ..."]:
        """Standard normal numbers, ``shape`` a row."""
        return torch.randn(self._rows, *shape, generator=self._generator)[self._share]

    def choices(self, count: int) -> Int64[Tensor, " row"]:
        """For each row one of 0 to ``count`` - 1, equally likely."""
        return torch.randint(count, (self._rows,), generator=self._generator)[self._share]

    def order(self, count: int) -> Int64[Tensor, " count"]:
        """A random order of 0 to ``count`` - 1, the same for every share."""
        return torch.randperm(count, generator=self._generator)

    @property
    def generator(self) -> torch.Generator:
        """The source itself, for losses that draw what depends on the rows: they take whole batches only.

        Raises:
            ConfigError: this is the noise of a share.
        """
        if self._share != slice(0, self._rows):
            raise ConfigError('only model = "concord" shares its batches: train others in one process, with accumulate = 1')
        return self._generator


@dataclass(frozen=True)
class Team:
    """The processes that train one model together, seen from one of them."""

    rank: int = 0
    size: int = 1
    parent: int | None = None
    """Number of the process that started this one."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def check(self, config: Config) -> None:
        """Before anything is read.

        Raises:
            ConfigError: a batch cannot be shared evenly.
        """
        for name in STAGES:
            stage = getattr(config, name)
            if stage.batch_size % (self.size * stage.accumulate):
                raise ConfigError(
                    f"{name}.batch_size is {stage.batch_size}, which {self.size} processes with {name}.accumulate = "
                    f"{stage.accumulate} cannot share evenly: make it a multiple of {self.size * stage.accumulate}"
                )

    def shares(self, rows: int, accumulate: int) -> list[slice]:
        """The rows of a batch that this process computes, pass by pass.

        Raises:
            ConfigError: fewer rows than shares.
        """
        count = self.size * accumulate
        if rows < count:
            raise ConfigError(
                f"a batch of {rows} rows is too small for {self.size} processes with accumulate = {accumulate}: lower either"
            )
        bounds = [rows * index // count for index in range(count + 1)]
        own = range(self.rank * accumulate, (self.rank + 1) * accumulate)
        return [slice(bounds[index], bounds[index + 1]) for index in own]

    def add_up(self, parameters: Iterable[Tensor], numbers: Shaped[Tensor, " number"]) -> Shaped[Tensor, " number"]:
        """Sum over all processes: the gradients of ``parameters`` in place, and ``numbers``.

        What no process has a gradient of keeps none, as in a single process: an optimiser leaves it alone.

        Raises:
            RunError: another process is gone, or torchrun is: what it left must not go on beside the next attempt.
        """
        if self.size == 1:
            return numbers
        if os.getppid() != self.parent:
            raise RunError("torchrun is gone: the same command continues from the last checkpoint")
        every = list(parameters)
        known = torch.tensor([parameter.grad is not None for parameter in every], dtype=numbers.dtype)
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
        sums = torch.cat([numbers, known, *(slope.reshape(-1) for slope in slopes)])
        try:
            distributed.all_reduce(sums)
        except RuntimeError as error:
            raise RunError(f"another of the {self.size} processes is gone, its message says why ({error})") from error
        sizes = [len(numbers), len(known), *(slope.numel() for slope in slopes)]
        numbers, known, *parts = sums.split(sizes)  # type: ignore[no-untyped-call]
        for parameter, some, part in zip(every, known.tolist(), parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter)) if some else None
        return numbers

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def team() -> Iterator[Team]:
    """The processes that torchrun started, joined while the context lasts; without torchrun this process alone."""
    if started() == 1:
        yield Team()
        return
    # Its functions have the group of the moment they are defined as a default. Imported later, by the first optimiser, they
    # would hold this group for good, and the group's threads now and then abort the end of the interpreter.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group()  # gloo for tensors of the CPU, nccl for those of a GPU
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size(), os.getppid())
    finally:
        distributed.destroy_process_group()


def started() -> int:
    """How many processes torchrun started, this one included; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def first() -> bool:
    """Whether this process is the first of them."""
    return started() == 1 or os.environ["RANK"] == "0"


def neighbours() -> int:
    """How many of them share this machine's cores, this one included."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
