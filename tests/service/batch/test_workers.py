"""Processes of a batch job for the GPUs and cores that there are."""

import pytest

from concord.service.batch.dataset import JobError
from concord.service.batch.workers import Workers, allocate_workers


@pytest.mark.parametrize(
    ("device", "requested", "gpus", "expected"),
    [
        ("cpu", None, 4, Workers(15, 0)),
        ("auto", None, 0, Workers(15, 0)),
        ("auto", None, 1, Workers(1, 1)),  # not one GPU for each of 15 cores
        ("cuda", None, 8, Workers(8, 1)),
        ("cuda", 2, 8, Workers(2, 1)),
        ("cuda", 8, 2, Workers(8, 0.25)),
        ("cpu", 3, 0, Workers(3, 0)),
    ],
)
def test_workers_are_as_many_as_the_gpus_else_as_the_cores(
    device: str, requested: int | None, gpus: int, expected: Workers
) -> None:
    assert allocate_workers(device, requested, gpus=gpus, cores=15) == expected


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "Ray found no GPU here"), ("cuda:2", "CONCORD_DEVICE=cuda and CUDA_VISIBLE_DEVICES=2")],
)
def test_gpu_that_is_not_there_or_is_named_by_number_raises(device: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        allocate_workers(device, None, gpus=0, cores=15)
