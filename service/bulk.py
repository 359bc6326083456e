"""A job over many Parquet files, by Ray Data: on the cores of this machine, or on a cluster."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray's default is to report its use to its makers

import ray

from service.dataset import Embedder, Job, JobError, Part
from service.settings import PREFIX

RETRIES = 3
"""A part whose workers die once more would take one worker after the other, for ever."""


class Worker:
    """One process of the job, with a runtime of its own."""

    def __init__(self, job: Job, source: str, output: str) -> None:
        self._embedder = Embedder(job, source, output)

    def __call__(self, part: dict[str, Any]) -> dict[str, int]:
        rows, failed = self._embedder.do(Part(**part))
        return {"rows": rows, "failed": failed}


def run(
    job: Job, parts: Sequence[Part], source: str, output: str, *, workers: int, address: str | None = None
) -> Iterator[tuple[int, int]]:
    """Do the parts, in any order. A worker that dies is replaced, and its part is done again, ``RETRIES`` times at most.

    Args:
        workers: processes, each with ``job.threads`` cores, and with a GPU where ``job.device`` is cuda.
        address: of a Ray cluster, whose nodes have this package and reach bundle, source and output. None: this machine.

    Yields:
        for each part, rows and rows without embedding.

    Raises:
        JobError: a part's workers die again and again.
    """
    gpus = 1 if job.device == "cuda" else 0
    if address is None:
        ray.init(address="local", num_cpus=workers * job.threads, num_gpus=workers * gpus, include_dashboard=False)
    else:
        ray.init(address=address)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        todo: Any = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
        done = todo.map(
            Worker,
            fn_constructor_args=(job, source, output),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
            num_cpus=job.threads,
            num_gpus=gpus,
            max_task_retries=RETRIES,
        )
        for row in done.iter_rows():
            yield row["rows"], row["failed"]
    except ray.exceptions.RayActorError:
        raise JobError(
            f"the workers of one part died {RETRIES + 1} times, often for want of memory. Lower {PREFIX}MAX_BATCH or --workers "
            "and say the same command again. It goes on from here"
        ) from None
    finally:
        ray.shutdown()
