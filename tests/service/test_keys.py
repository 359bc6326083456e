"""The file of keys: what it may hold, how it changes while it is read, and what a quota lets through."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep, thread_time_ns
from typing import Any

import pytest
import structlog

from service import keys
from service.keys import Bucket, Keys, KeysError

ADA = "the-key-of-a-lovelace"
GRACE = "the-key-of-g-hopper"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def names(found: Keys, *presented: str) -> list[str | None]:
    return [key and key.name for key in (found.find(one.encode()) for one in presented)]  # type: ignore[misc]


def test_keys_names_quotas_and_hashes(file: Path) -> None:
    hashed = "sha256:" + hashlib.sha256(GRACE.encode()).hexdigest()
    file.write_text(f"# who\n\n  {ADA}\tada   50 \n{hashed} grace\r\nthe-third-of-the-keys\n")
    found = Keys(file, burst=32)
    unnamed = hashlib.sha256(b"the-third-of-the-keys").hexdigest()[:8]
    assert names(found, ADA, GRACE, "the-third-of-the-keys") == ["ada", "grace", unnamed]
    ada, grace = found.find(ADA.encode()), found.find(GRACE.encode())
    assert ada is not None
    assert grace is not None
    assert ada.quota is not None
    assert (ada.quota.rate, grace.quota) == (50, None)
    assert names(found, "", ADA[:-1], ADA + " ", ADA.upper(), hashed, "x" * 100_000) == [None] * 6
    assert ADA not in repr(ada)
    assert ada.digest.hex() not in repr(ada)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds none"),
        ("# nobody\n", "holds none"),
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
def test_a_file_that_is_wrong_is_told_and_never_quoted(file: Path, content: str, told: str) -> None:
    file.write_text(content, "utf-8")
    with pytest.raises(KeysError, match=told) as caught:
        Keys(file, burst=1)
    assert ADA not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        Keys(tmp_path / "none", burst=1)
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    with pytest.raises(KeysError, match="UTF-8"):
        Keys(tmp_path / "bytes", burst=1)


def test_a_changed_file_counts_and_a_broken_one_does_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.01)
    file.write_text(f"{ADA} ada\n")
    found = Keys(file, burst=1)

    async def until(condition: Callable[[], bool]) -> None:
        deadline = monotonic() + 20
        while not condition():
            assert monotonic() < deadline
            await asyncio.sleep(0.005)

    async def rotate() -> None:
        async with found.watched():
            file.write_text(f"{ADA} ada\n{GRACE} grace\n")
            await until(lambda: names(found, ADA, GRACE) == ["ada", "grace"])
            with structlog.testing.capture_logs() as logged:
                for number, broken in enumerate((f"{GRACE} grace\nshort\n", "# nobody\n", "two\nkeys\n")):
                    file.write_text(broken)
                    await until(lambda number=number: len(logged) > number)  # type: ignore[misc]
                    await asyncio.sleep(0.05)
                file.unlink()
                await until(lambda: len(logged) > 3)
            assert names(found, ADA, GRACE) == ["ada", "grace"]
            assert {entry["log_level"] for entry in logged} == {"error"}
            assert len(logged) == 4, "each state is told once"
            assert not any(key in str(logged) for key in (ADA, GRACE, "short\\n"))
            file.symlink_to(file.with_suffix(".new"))  # how Kubernetes swaps a secret
            file.with_suffix(".new").write_text(f"{GRACE} grace\n")
            await until(lambda: names(found, ADA, GRACE) == [None, "grace"])

    asyncio.run(rotate())
    file.with_suffix(".new").write_text(f"{ADA} ada\n")
    sleep(0.1)
    assert names(found, ADA, GRACE) == [None, "grace"], "nobody reads it any more"


def test_a_quota_goes_on_over_a_change_of_the_file(file: Path) -> None:
    def quota() -> Bucket:
        key = found.find(ADA.encode())
        assert key is not None
        assert key.quota is not None
        return key.quota

    file.write_text(f"{ADA} ada 0.001\n")
    found = Keys(file, burst=4)
    assert quota().take(4) == 0
    file.write_text(f"{ADA} countess 0.001\n{GRACE}\n")
    found.refresh()
    assert names(found, ADA) == ["countess"]
    assert quota().take(1) > 0
    file.write_text(f"{ADA} countess 0.002\n{GRACE}\n")
    found.refresh()
    assert quota().take(4) == 0


def test_a_bucket_lets_a_burst_through_and_then_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(keys, "monotonic", lambda: now)
    bucket = Bucket(rate=10, burst=32)
    assert bucket.wait_ms(32) == 0
    assert bucket.take(32) == 0
    assert bucket.take(1) == 100
    assert bucket.wait_ms(5) == 500
    now += 0.5
    assert bucket.take(6) == 100, "all or none"
    assert bucket.take(5) == 0
    now += 3600
    assert bucket.take(33) == 100, "a pause saves up no more than a burst"
    assert bucket.take(32) == 0


def test_a_rate_above_the_burst_is_its_own_burst() -> None:
    assert Bucket(rate=1000, burst=32).take(1000) == 0


def test_threads_cannot_overdraw_a_bucket() -> None:
    bucket = Bucket(rate=1e-6, burst=1000)
    taken: list[int] = []

    def draw() -> None:
        taken.extend(bucket.take(1) == 0 for _ in range(500))

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 1000


def test_the_documented_example_is_read(file: Path) -> None:
    assert keys.__doc__ is not None
    lines = [line.strip() for line in keys.__doc__.splitlines() if line.startswith("    ")]
    file.write_text("\n".join(lines))
    assert names(Keys(file, burst=1), "test", "hSdu3nq0bY1fT2ZkTqk8") == ["grace", "ada"]


def test_the_time_to_refuse_tells_nothing_of_the_key(file: Path) -> None:
    """A prefix of the key takes as long as anything else: the hashes are compared, and every one of them."""
    file.write_text("".join(f"{number:032d}\n" for number in range(200)))
    found = Keys(file, burst=1)

    def taken(presented: bytes) -> int:
        times = []
        for _ in range(50):
            began = thread_time_ns()
            found.find(presented)
            times.append(thread_time_ns() - began)
        return sorted(times)[5]

    near, far, first = taken(b"0" * 31), taken(b"x" * 31), taken(b"0" * 32)
    assert max(near, far, first) < 3 * min(near, far, first)


@pytest.fixture(autouse=True)
def _quiet(caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL)
