"""An estimate of the training time, from a few timed steps of each stage."""

import time

import torch

from concord.training.config import Config
from concord.training.data.dataset import Dataset
from concord.training.device import precision, resolve_device
from concord.training.distributed import Noise, ProcessGroup, local_world_size
from concord.training.fit import SINGLE_PROCESS, adamw, build
from concord.training.forecast import Forecast
from concord.training.machine import freed_memory_kept
from concord.training.trainable import Stage, TrainableModel

FIRST_ROWS = 4
"""Rows of the first timed pass."""


@freed_memory_kept()
def estimate(config: Config, data: Dataset, seconds: float, group: ProcessGroup = SINGLE_PROCESS) -> Forecast:
    """Return a forecast of the training time, from timed steps of a new model on the first rows of an epoch.

    Where a step on a whole batch takes too long, a part of the batch is timed, and the time is extrapolated. The states of
    PyTorch's global generators do not change. All processes of a group call this function at the same time.

    Args:
        seconds: time limit of the steps. Three steps on a few rows are taken in any case.

    Raises:
        ConfigError: there are too few rows to hold ``validation.rows`` out.
    """
    if config.validation.rows:
        data, _ = data.hold_out(config.validation.rows)
    torch.set_num_threads(config.threads_per_process(local_world_size()))
    with torch.random.fork_rng(devices=()):
        model = build(config, data.modalities).train()
        stages = model.stages(config)
        step_seconds = []
        for stage in stages:
            stage.begin()
            parts = [stage, *([stage.companion] if stage.companion else [])]
            limit = seconds / len(stages) / len(parts)
            step_seconds.append(sum(_step_seconds(config, part.rows(data), group, model, part, limit) for part in parts))
    steps = [stage.settings.epochs * stage.rows(data).steps_per_epoch(stage.settings.batch_size) for stage in stages]
    return Forecast(step_seconds, steps)


def _step_seconds(
    config: Config, data: Dataset, group: ProcessGroup, model: TrainableModel, stage: Stage, limit: float
) -> float:
    """Return the estimated time of one step of a stage.

    Each timed pass has twice as many rows as the one before, up to the rows of a micro-batch or until the next would exceed the
    limit. The last two are extrapolated.
    """
    settings = stage.settings
    device = resolve_device(config.device)
    batch = next(data.batches(0, settings.batch_size, 0)).to(device)
    processes = 1 if data.shard else group.size  # a shard has this process's part of each batch
    rows = max(1, len(batch) // (processes * settings.accumulate))
    optimizer = adamw(model, 0.0)  # the weights stay those of a new model
    start = time.perf_counter()

    def time_pass(count: int) -> float:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with precision(config, device):
            loss, _ = stage(batch.take(slice(0, count)), Noise(0, count, device=device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()  # waits for the device
        return time.perf_counter() - began

    timed = first = min(rows, FIRST_ROWS)
    time_pass(timed)  # also allocates memory and selects kernels
    seconds = time_pass(timed)
    per_row = seconds / timed
    while timed < rows:
        larger = min(rows, 2 * timed)
        is_necessary = timed == first  # one size cannot separate the constant part of the time
        if not is_necessary and time.perf_counter() - start + seconds * larger / timed > limit:
            break
        longer = time_pass(larger)
        per_row = max(0.0, longer - seconds) / (larger - timed)
        timed, seconds = larger, longer
    return settings.accumulate * (seconds + per_row * (rows - timed))
