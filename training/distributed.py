"""Data parallelism: a batch is split between the processes that torchrun started, and into the micro-batches of one process.

A loss is a mean over rows, and the noise of a step is sampled for the whole batch before a micro-batch takes its rows. So the
split changes the result by rounding only.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, distributed

from concord.training.config import STAGES, Config
from concord.training.errors import ConfigError, RunError, TrainingError

CPU = torch.device("cpu")
DEVICE_KINDS = ("cpu", "cuda", "mps")
WAIT = timedelta(hours=12)
"""How long a process waits for the others: rank zero may read a large data set first. torchrun ends all if one has ended."""
T = TypeVar("T")


class Noise:
    """The random numbers of one step, sampled for the whole batch and cut to the rows of one micro-batch.

    Args:
        seed: of the step.
        rows: number of rows of the whole batch.
        micro_batch: the rows to return numbers for. None: all rows.
        device: of the returned tensors. The numbers are sampled on the CPU, so they are the same on every device.
    """

    def __init__(self, seed: int, rows: int, micro_batch: slice | None = None, device: torch.device = CPU) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = rows
        self._taken = torch.arange(rows)[micro_batch or slice(0, rows)]
        self.device = device

    def take(self, rows: Int64[Tensor, " taken"]) -> "Noise":
        """Return the numbers of some of the rows. Both objects continue the same sequence."""
        part = copy(self)
        part._taken = self._taken[rows.cpu()]
        return part

    def normal(self, *shape: int) -> Float[Tensor, "row ..."]:
        """Return standard normal numbers, an array of ``shape`` for each row."""
        return self._move(torch.randn(self._rows, *shape, generator=self._generator)[self._taken])

    def choices(self, count: int) -> Int64[Tensor, " row"]:
        """Return an integer for each row, uniform over 0 to ``count`` - 1."""
        return self._move(torch.randint(count, (self._rows,), generator=self._generator)[self._taken])

    def dropout(self, rate: float, *shape: int) -> Float[Tensor, "row ..."]:
        """Return an array of ``shape`` for each row: 0 with probability ``rate``, else 1 / (1 - rate). Its mean is 1."""
        kept = torch.rand(self._rows, *shape, generator=self._generator)[self._taken] >= rate
        return self._move(kept / (1 - rate))

    def split(self, share: float) -> tuple[Int64[Tensor, " chosen"], Int64[Tensor, " other"]]:
        """Return the indices of a random choice of the rows, each chosen with probability ``share``, and of all other rows.

        Systematic sampling: the chosen rows are spread evenly, so micro-batches have about the same number of them.
        """
        start = torch.rand(1, generator=self._generator, dtype=torch.float64)
        passed = (start + share * torch.arange(self._rows + 1, dtype=torch.float64)).floor()
        is_chosen = (passed.diff() > 0)[self._taken]
        return self._move(is_chosen.nonzero().flatten()), self._move((~is_chosen).nonzero().flatten())

    def order(self, count: int) -> Int64[Tensor, " count"]:
        """Return a random permutation of 0 to ``count`` - 1, the same for every micro-batch."""
        return self._move(torch.randperm(count, generator=self._generator))

    def _move(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.device, non_blocking=True)

    @property
    def generator(self) -> torch.Generator:
        """The generator itself, for losses whose random numbers depend on the rows. They need the whole batch at once.

        Raises:
            ConfigError: this noise is of a micro-batch.
        """
        if len(self._taken) < self._rows:
            raise ConfigError(
                'only model = "concord" can split its batches: train other models in one process, with accumulate = 1'
            )
        return self._generator


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train one model together, as one of them sees them.

    Attributes:
        rank: index of this process.
        size: number of processes.
        parent_pid: process id of torchrun, which started this process. None: a single process without torchrun.
    """

    rank: int = 0
    size: int = 1
    parent_pid: int | None = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def validate(self, config: Config) -> None:
        """Check that every batch can be split evenly.

        Raises:
            ConfigError: a batch size is not a multiple of processes times ``accumulate``.
        """
        for name in STAGES:
            stage = getattr(config, name)
            if stage.batch_size % (self.size * stage.accumulate):
                raise ConfigError(
                    f"{name}.batch_size is {stage.batch_size}, which cannot be split evenly between {self.size} processes with "
                    f"{name}.accumulate = {stage.accumulate}: make it a multiple of {self.size * stage.accumulate}"
                )

    def micro_batches(self, rows: int, accumulate: int) -> list[slice]:
        """Return the rows of each micro-batch of this process.

        Args:
            rows: of the whole batch.
            accumulate: micro-batches of each process.

        Raises:
            ConfigError: there are fewer rows than micro-batches.
        """
        count = self.size * accumulate
        if rows < count:
            raise ConfigError(
                f"a batch of {rows} rows is too small for {self.size} processes with accumulate = {accumulate}: lower either"
            )
        bounds = [rows * index // count for index in range(count + 1)]
        indices = range(self.rank * accumulate, (self.rank + 1) * accumulate)
        return [slice(bounds[index], bounds[index + 1]) for index in indices]

    def all_reduce(self, parameters: Iterable[Tensor], numbers: Shaped[Tensor, " number"]) -> Shaped[Tensor, " number"]:
        """Sum the gradients of ``parameters``, in place, and ``numbers`` over all processes.

        A parameter without a gradient in every process keeps none, as in a single process: the optimiser skips it.

        Returns:
            The sums of ``numbers``.

        Raises:
            RunError: another process or torchrun has ended. This process must not run on next to a restarted run.
        """
        if self.size == 1:
            return numbers
        all_parameters = list(parameters)
        has_gradient = numbers.new_tensor([parameter.grad is not None for parameter in all_parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in all_parameters]
        sums = torch.cat([numbers, has_gradient, *(gradient.reshape(-1) for gradient in gradients)])
        self._sum(sums)
        sizes = [len(numbers), len(has_gradient), *(gradient.numel() for gradient in gradients)]
        numbers, has_gradient, *parts = sums.split(sizes)  # type: ignore[no-untyped-call]
        for parameter, processes, part in zip(all_parameters, has_gradient.tolist(), parts, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter)) if processes else None
        return numbers

    def sum(self, numbers: Shaped[Tensor, " number"]) -> Shaped[Tensor, " number"]:
        """Return the sums of numbers over all processes, the same in each.

        Raises:
            RunError: as ``all_reduce``.
        """
        sums = numbers.clone()
        if self.size > 1:
            self._sum(sums)
        return sums

    def gather(self, parts: Sequence[tuple[slice, Tensor]], rows: int) -> Float[Tensor, "row ..."]:
        """Return an array for every row of a batch, in every process.

        Args:
            parts: the micro-batches of this process and the arrays of their rows.
            rows: of the whole batch.

        Raises:
            RunError: as ``all_reduce``.
        """
        whole = parts[0][1].new_zeros(rows, *parts[0][1].shape[1:])
        for micro_batch, part in parts:
            whole[micro_batch] = part
        if self.size > 1:
            self._sum(whole)  # all processes but one have zeros in a row, so the sum is exact
        return whole

    def _sum(self, values: Tensor) -> None:
        """Sum ``values`` over all processes, in place."""
        if os.getppid() != self.parent_pid:
            raise RunError("torchrun has ended: the same command continues from the last checkpoint")
        try:
            distributed.all_reduce(values)
        except RuntimeError as error:
            raise RunError(f"another of the {self.size} processes has ended, its message says why ({error})") from error

    def gather_results(self, function: Callable[[], T]) -> list[T]:
        """Call a function in every process and return the results of all, in the order of the ranks.

        Raises:
            TrainingError, OSError: that of the first process whose call raises one, in every process.
        """
        outcome: T | Exception
        try:
            outcome = function()
        except (TrainingError, OSError) as error:
            outcome = error
        outcomes: list[Any] = [outcome] * self.size
        if self.size > 1:
            distributed.all_gather_object(outcomes, outcome)
        if (failed := next((found for found in outcomes if isinstance(found, Exception)), None)) is not None:
            raise failed
        return outcomes

    def from_rank_zero(self, function: Callable[[], T]) -> T:
        """Call a function in rank zero only and return its result in every process. Errors as ``gather_results``."""
        result = self.gather_results(lambda: function() if self.is_rank_zero else None)[0]
        return cast(T, result)

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def process_group(device: torch.device = CPU) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, for the duration of the context. Without torchrun: this process only.

    Args:
        device: of this process. Every process needs one of the same kind.

    Raises:
        ConfigError: the processes have devices of different kinds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1:
        yield ProcessGroup()
        return
    # The functions of this module take the group that exists when the module is imported as their default. If the first
    # optimiser imported it, they would keep this group alive, and its threads sometimes abort the exit of the interpreter.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group(timeout=WAIT)  # gloo for tensors on the CPU, nccl for tensors on a GPU
    try:
        check_devices(device)
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size(), os.getppid())
    finally:
        distributed.destroy_process_group()


def check_devices(device: torch.device) -> None:
    """Check that the devices of all processes are of the same kind.

    Raises:
        ConfigError: they are not.
    """
    kinds = torch.zeros(distributed.get_world_size(), dtype=torch.int64)
    kinds[distributed.get_rank()] = 1 + DEVICE_KINDS.index(device.type)
    distributed.all_reduce(kinds)  # on the CPU, by gloo
    names = [DEVICE_KINDS[kind - 1] for kind in kinds.tolist()]
    if len(set(names)) > 1:
        raise ConfigError(
            f"the processes of torchrun have the devices {', '.join(names)}: set device to cpu, or start them where each has "
            "a GPU"
        )


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def local_world_size() -> int:
    """Return the number of processes that share the cores of this machine, 1 without torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
