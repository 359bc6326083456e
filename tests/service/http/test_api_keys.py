"""The file of API keys: its format, changes while the service runs, and quotas."""

import asyncio
import hashlib
import logging
import threading
from pathlib import Path
from time import thread_time_ns

import pytest
import structlog

from concord.service.http import api_keys
from concord.service.http.api_keys import ApiKeys, ApiKeysError, TokenBucket
from tests.support.waiting import wait_for_async

ADA = "the-key-of-a-lovelace"
GRACE = "the-key-of-g-hopper"


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def replace(file: Path, content: str) -> None:
    """Write the file atomically: a poll never sees half of it."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(content)
    temporary.replace(file)


def names(keys: ApiKeys, *presented: str) -> list[str | None]:
    """Return the name of each presented key; None for an unknown key."""
    return [key and key.name for key in (keys.find(text.encode()) for text in presented)]  # type: ignore[misc]


def test_find_matches_plain_and_hashed_keys_exactly(file: Path) -> None:
    hashed = "sha256:" + hashlib.sha256(GRACE.encode()).hexdigest()
    file.write_text(f"# who\n\n  {ADA}\tada   50 \n{hashed} grace\r\nthe-third-of-the-keys\n")
    keys = ApiKeys(file, burst=32)
    default_name = hashlib.sha256(b"the-third-of-the-keys").hexdigest()[:8]
    assert names(keys, ADA, GRACE, "the-third-of-the-keys") == ["ada", "grace", default_name]
    ada, grace = keys.find(ADA.encode()), keys.find(GRACE.encode())
    assert ada is not None
    assert grace is not None
    assert ada.quota is not None
    assert (ada.quota.rate, grace.quota) == (50, None)
    assert names(keys, "", ADA[:-1], ADA + " ", ADA.upper(), hashed, "x" * 100_000) == [None] * 6
    assert ADA not in repr(ada)
    assert ada.digest.hex() not in repr(ada)


def test_find_matches_the_first_key_of_a_file_with_a_byte_order_mark(file: Path) -> None:
    file.write_bytes(f"\ufeff{ADA} ada\n{GRACE}\n".encode())
    assert names(ApiKeys(file, burst=32), ADA) == ["ada"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds none"),
        ("# comment\n", "holds none"),
        ("short\n", "line 1"),
        (f"{ADA}\nthe-key-of-the-müller\n", "line 2"),
        (f"{ADA} ada 1 more\n", "line 1"),
        (f"{ADA} a/da\n", "a name is"),
        (f"{ADA} ada fast\n", "positive number"),
        (f"{ADA} ada 0\n", "positive number"),
        (f"{ADA} ada inf\n", "positive number"),
        (f"{ADA} ada nan\n", "positive number"),
        (f"{ADA} ada\n{ADA} grace\n", "twice"),
        ("sha256:0123456789abcdef\n", "line 1"),
    ],
)
def test_invalid_file_is_rejected_without_quoting_a_key(file: Path, content: str, message: str) -> None:
    file.write_text(content, "utf-8")
    with pytest.raises(ApiKeysError, match=message) as caught:
        ApiKeys(file, burst=1)
    assert ADA not in str(caught.value)


def test_unreadable_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError, match="No such file"):
        ApiKeys(tmp_path / "none", burst=1)
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    with pytest.raises(ApiKeysError, match="UTF-8"):
        ApiKeys(tmp_path / "bytes", burst=1)


def test_watched_file_takes_effect_when_it_changes_unless_it_is_invalid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "POLL_SECONDS", 0.01)
    file.write_text(f"{ADA} ada\n")
    keys = ApiKeys(file, burst=1)
    refresh = keys.refresh
    polls = 0

    def counted() -> None:
        nonlocal polls
        refresh()
        polls += 1

    monkeypatch.setattr(keys, "refresh", counted)

    async def wait_for_polls(count: int) -> None:
        end = polls + count
        await wait_for_async(lambda: polls >= end)

    async def test() -> None:
        async with keys.watched():
            replace(file, f"{ADA} ada\n{GRACE} grace\n")
            await wait_for_async(lambda: names(keys, ADA, GRACE) == ["ada", "grace"])
            with structlog.testing.capture_logs() as logged:
                for number, invalid in enumerate((f"{GRACE} grace\nshort\n", "# comment\n", "two\nkeys\n")):
                    replace(file, invalid)
                    await wait_for_async(lambda number=number: len(logged) > number)  # type: ignore[misc]
                    await wait_for_polls(3)
                file.unlink()
                await wait_for_async(lambda: len(logged) > 3)
                await wait_for_polls(3)
            assert names(keys, ADA, GRACE) == ["ada", "grace"]
            assert {entry["log_level"] for entry in logged} == {"error"}
            assert len(logged) == 4, "an error is logged once, not at every poll"
            assert not any(key in str(logged) for key in (ADA, GRACE, "short\\n"))
            file.symlink_to(file.with_suffix(".new"))  # how Kubernetes replaces a secret
            file.with_suffix(".new").write_text(f"{GRACE} grace\n")
            await wait_for_async(lambda: names(keys, ADA, GRACE) == [None, "grace"])
        await wait_for_async(lambda: asyncio.all_tasks() == {asyncio.current_task()}, message="the file is still polled")

    asyncio.run(test())
    file.with_suffix(".new").write_text(f"{ADA} ada\n")
    assert names(keys, ADA, GRACE) == [None, "grace"], "the file was read outside the context"


def test_quota_keeps_its_state_over_a_refresh_unless_its_rate_changes(file: Path) -> None:
    def quota() -> TokenBucket:
        key = keys.find(ADA.encode())
        assert key is not None
        assert key.quota is not None
        return key.quota

    file.write_text(f"{ADA} ada 0.001\n")
    keys = ApiKeys(file, burst=4)
    assert quota().take(4) == 0
    file.write_text(f"{ADA} countess 0.001\n{GRACE}\n")
    keys.refresh()
    assert names(keys, ADA) == ["countess"]
    assert quota().take(1) > 0
    file.write_text(f"{ADA} countess 0.002\n{GRACE}\n")
    keys.refresh()
    assert quota().take(4) == 0


def test_bucket_allows_a_burst_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(api_keys, "monotonic", lambda: now)
    bucket = TokenBucket(rate=10, burst=32)
    assert bucket.wait_ms(32) == 0
    assert bucket.take(32) == 0
    assert bucket.take(1) == 100
    assert bucket.wait_ms(5) == 500
    now += 0.5
    assert bucket.take(6) == 100, "all items are taken or none"
    assert bucket.take(5) == 0
    now += 3600
    assert bucket.take(32) == 0
    assert bucket.take(1) == 100, "a pause saves up at most a burst"


def test_bucket_gives_more_than_a_burst_only_when_full_and_keeps_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(api_keys, "monotonic", lambda: now)
    bucket = TokenBucket(rate=10, burst=32)
    assert bucket.take(1) == 0
    assert bucket.take(200) == 100
    now += 0.125
    assert bucket.take(200) == 0
    assert bucket.wait_ms(1) == 16_900, "168 items were borrowed"


def test_bucket_with_a_rate_above_the_burst_allows_one_second_at_once() -> None:
    assert TokenBucket(rate=1000, burst=32).take(1000) == 0


def test_bucket_taken_from_by_many_threads_is_never_overdrawn() -> None:
    bucket = TokenBucket(rate=1e-6, burst=1000)
    successes: list[int] = []

    def take() -> None:
        successes.extend(bucket.take(1) == 0 for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(successes) == 1000


def test_example_in_the_module_docstring_is_a_valid_file(file: Path) -> None:
    assert api_keys.__doc__ is not None
    lines = [line.strip() for line in api_keys.__doc__.splitlines() if line.startswith("    ")]
    file.write_text("\n".join(lines))
    assert names(ApiKeys(file, burst=1), "test", "hSdu3nq0bY1fT2ZkTqk8") == ["grace", "ada"]


def test_find_takes_the_same_time_for_every_key(file: Path) -> None:
    """A prefix of a key takes as long as any other input: find compares hashes, and all of them."""
    file.write_text("".join(f"{number:032d}\n" for number in range(200)))
    keys = ApiKeys(file, burst=1)

    def nanoseconds(presented: bytes) -> int:
        """Return a low quantile of the thread's processor time."""
        times = []
        for _ in range(50):
            began = thread_time_ns()
            keys.find(presented)
            times.append(thread_time_ns() - began)
        return sorted(times)[5]

    prefix, unknown, first = nanoseconds(b"0" * 31), nanoseconds(b"x" * 31), nanoseconds(b"0" * 32)
    assert max(prefix, unknown, first) < 3 * min(prefix, unknown, first)
