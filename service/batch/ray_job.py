"""Runs a batch job with Ray Data: on the cores of this machine, or on a cluster."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use by default

import ray
import ray.data

from concord.model.runtime.device import DeviceLostError, cuda_is_installed
from concord.service.batch.dataset import BatchJob, Done, Embedder, JobError, Part
from concord.service.batch.workers import allocate_workers
from concord.service.settings import PREFIX

RETRIES = 3
"""Of a part whose worker died. Without a limit, a part that kills its worker would be retried for ever."""


class Worker:
    """One process of the job, with its own runtime."""

    def __init__(self, job: BatchJob, source: str, output: str) -> None:
        self._embedder = Embedder(job, source, output)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._embedder.process(Part(**part))._asdict()
        except DeviceLostError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)  # no part can run in this process any more; Ray starts another one


def run(
    job: BatchJob, parts: Sequence[Part], source: str, output: str, *, workers: int | None = None, address: str | None = None
) -> Iterator[Done]:
    """Process the parts, in any order. A worker that dies is replaced, and its part is retried, at most ``RETRIES`` times.

    Args:
        workers: processes, each with a core for each of its threads, and its share of the GPUs. None: as ``allocate_workers``
            chooses.
        address: of a Ray cluster, whose nodes have this package and reach bundle, source and output. None: this machine.

    Yields:
        what was done, for each part.

    Raises:
        JobError: there is no GPU for device cuda, or a part's workers died in every attempt.
    """
    with _quiet():
        yield from _run(job, parts, source, output, workers, address)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide Ray's notes on its own working during the context. They are printed if it ends with an error.

    Python's part of Ray logs below the level of errors. Its other part writes to the file descriptor of standard error.
    """
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as notes, os.fdopen(os.dup(2), "w", buffering=1) as shown:
        stderr, sys.stderr = sys.stderr, shown
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except Exception:
            notes.seek(0)
            shown.write(notes.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(shown.fileno(), 2)
            sys.stderr = stderr


def _run(
    job: BatchJob, parts: Sequence[Part], source: str, output: str, workers: int | None, address: str | None
) -> Iterator[Done]:
    device, threads = job.runtime_options.get("device", "cpu"), job.runtime_options["threads"]
    cores = max(1, len(os.sched_getaffinity(0)) // threads)
    if address is None:
        # Ray finds the GPUs of this machine, which must be as many as it says: it numbers them for the workers.
        ray.init(
            address="local",
            num_cpus=(workers or cores) * threads,
            num_gpus=0 if device == "cpu" else None,
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(address=address, logging_level=logging.ERROR)
    try:
        # The build of ONNX Runtime for CPUs cannot use them.
        gpus = 0 if device == "auto" and not cuda_is_installed() else int(ray.cluster_resources().get("GPU", 0))
        count, share = allocate_workers(device, workers, gpus=gpus, cores=cores)
        # map() has no other way yet to limit the retries.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", ray.util.annotations.RayDeprecationWarning)
        ray.data.DataContext.get_current().enable_progress_bars = False
        waiting: Any = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
        done = waiting.map(
            Worker,
            fn_constructor_args=(job, source, output),
            compute=ray.data.ActorPoolStrategy(size=min(count, len(parts))),
            num_cpus=threads,
            num_gpus=share,
            max_task_retries=RETRIES,
        )
        for row in done.iter_rows():
            yield Done(**row)
    except ray.exceptions.RayActorError:
        raise JobError(
            f"the workers of one part died {RETRIES + 1} times, often because memory ran out. Lower {PREFIX}MAX_BATCH or "
            "--workers and run the same command again. It continues from here"
        ) from None
    finally:
        ray.shutdown()
