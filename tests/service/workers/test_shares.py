"""What each worker gets."""

import pytest
from pydantic import ValidationError

from concord.service.settings import Settings
from concord.service.workers.shares import worker_count, worker_settings
from concord.service.workers.supervisor import MAX_BACKOFF_SECONDS, backoff_seconds


@pytest.mark.parametrize(
    ("options", "gpu", "count"),
    [
        ({}, False, 1),
        ({"workers": "3"}, True, 3),
        ({"workers": "auto"}, False, 16),
        ({"workers": "auto", "threads": 2}, False, 2),
        ({"workers": "auto", "threads": 1}, True, 4),
    ],
)
def test_worker_count_follows_cores_threads_and_the_gpu(options: dict[str, object], gpu: bool, count: int) -> None:
    assert worker_count(Settings(**options), cores=16, gpu=gpu) == count


@pytest.mark.parametrize("value", ["0", "-1", "many", "1000"])
def test_settings_reject_other_numbers_of_workers(value: str) -> None:
    with pytest.raises(ValidationError):
        Settings(workers=value)


def test_worker_settings_split_the_limits_of_the_service() -> None:
    settings = Settings(workers="4", gpu_memory_mb=1001, max_bodies_bytes=256 << 20)
    share = worker_settings(settings, 4, cores=16, gpu=False)
    assert (share.workers, share.threads, share.gpu_memory_mb, share.max_bodies_bytes) == ("1", 4, 251, 64 << 20)
    assert share.watch_seconds == 0
    assert worker_settings(settings, 32, cores=16, gpu=False).threads == 1
    assert worker_settings(settings, 32, cores=16, gpu=False).max_bodies_bytes == settings.max_body_bytes
    assert worker_settings(settings, 4, cores=16, gpu=True).threads == 0, "one thread, as without workers"
    assert worker_settings(Settings(threads=8), 4, cores=16, gpu=False).threads == 2


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [backoff_seconds(failures) for failures in range(1, 6)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert backoff_seconds(100) == MAX_BACKOFF_SECONDS
