"""How many processes a batch job has, and what each of them gets of cores and GPUs."""

from typing import NamedTuple

from concord.service.batch.dataset import JobError


class Workers(NamedTuple):
    """Processes, and the share of a GPU for each."""

    processes: int
    gpu_share: float
    """1 or less: several processes may share a GPU. 0: they run on the CPU."""


def allocate_workers(device: str, requested: int | None, *, gpus: int, cores: int) -> Workers:
    """Return the processes of a job: one for each GPU, else one for each ``cores``, unless their number is requested.

    Args:
        device: the setting ``CONCORD_DEVICE``.
        requested: number of processes. More than there are GPUs share them.
        gpus: number of GPUs that Ray found.
        cores: number of processes that the cores allow.

    Raises:
        JobError: there is no GPU for ``cuda``, or one GPU is named by its number.
    """
    if ":" in device:
        number = device.partition(":")[2]
        raise JobError(
            f"device is {device}, but a batch job uses every GPU that it sees. Set CONCORD_DEVICE=cuda and "
            f"CUDA_VISIBLE_DEVICES={number}"
        )
    if device == "cuda" and not gpus:
        raise JobError(
            "device is cuda, but Ray found no GPU here. Check nvidia-smi and CUDA_VISIBLE_DEVICES, or set CONCORD_DEVICE=cpu"
        )
    if device == "cpu" or not gpus:
        return Workers(requested or cores, 0)
    count = requested or gpus
    return Workers(count, min(1.0, gpus / count))
