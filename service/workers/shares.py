"""How many workers there are, and what each of them gets of the cores, the memory and the GPU."""

from concord.model.runtime.device import MAX_THREADS
from concord.service.settings import Settings

MAX_GPU_WORKERS = 4
"""Workers of ``auto`` on a GPU: each holds a CUDA context and the weights."""


def worker_count(settings: Settings, *, cores: int, gpu: bool) -> int:
    """The number of workers: as the settings say, or one for each core, on a GPU at most ``MAX_GPU_WORKERS``.

    Args:
        cores: that this process may use. The setting ``threads`` takes precedence: in a container with a limit of CPU time it
            says how many cores that is.
        gpu: whether the graphs run on a GPU, where the setting ``threads`` says nothing about cores.
    """
    if settings.workers != "auto":
        return int(settings.workers)
    return min(cores, MAX_GPU_WORKERS) if gpu else settings.threads or cores


def worker_settings(settings: Settings, count: int, *, cores: int, gpu: bool) -> Settings:
    """The settings of each of ``count`` workers: limits of the whole service are split between them. Only the supervisor
    watches the bundle folders."""
    threads = settings.threads if gpu else max(1, (settings.threads or min(cores, count * MAX_THREADS)) // count)
    return settings.model_copy(
        update={
            "workers": "1",
            "threads": threads,
            "gpu_memory_mb": -(-settings.gpu_memory_mb // count),
            "max_bodies_bytes": max(settings.max_body_bytes, settings.max_bodies_bytes // count),
            "watch_seconds": 0.0,
        }
    )
