"""Quotas in shared memory: counted once by several processes, and not blocked by one that is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from concord.service.http import shared_quotas
from concord.service.http.api_keys import ApiKeys, ApiKeysError, TokenBucket
from concord.service.http.shared_quotas import SharedLevels
from tests.support.server import ROOT, Serve

TAKE = """
import sys
from concord.service.http.api_keys import TokenBucket
from concord.service.http.shared_quotas import SharedLevels

bucket = TokenBucket(1e-9, 50_000, SharedLevels(int(sys.argv[1])), b"ada")
print("ready", flush=True)
sys.stdin.readline()
print(sum(bucket.take(1) == 0 for _ in range(40_000)))
"""
HOLD = """
import sys, time
from concord.service.http.api_keys import TokenBucket
from concord.service.http.shared_quotas import SharedLevels

bucket = TokenBucket(1e-9, 500, SharedLevels(int(sys.argv[1])), bytes.fromhex(sys.argv[2]))
with bucket._level.locked(blocking=True):
    print("held", flush=True)
    time.sleep(600)
"""


def process(script: str, levels: SharedLevels, identity: bytes = b"ada") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, str(levels.descriptor), identity.hex()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, pass_fds=[levels.descriptor], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def test_processes_take_a_shared_quota_once() -> None:
    levels = SharedLevels.create()
    processes = [process(TAKE, levels) for _ in range(2)]
    for one in processes:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in processes:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    assert sum(int(one.communicate(timeout=60)[0]) for one in processes) == 50_000


def test_killed_process_does_not_keep_a_quota_locked() -> None:
    levels = SharedLevels.create()
    with process(HOLD, levels) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        bucket = TokenBucket(1e-9, 500, levels, b"ada")
        for take in (bucket.take, bucket.wait_ms):
            with pytest.raises(BlockingIOError):
                take(1, blocking=False)
        assert TokenBucket(1e-9, 500, levels, b"grace").take(500, blocking=False) == 0
        holder.send_signal(signal.SIGKILL)
    assert bucket.take(500, blocking=False) == 0


def test_server_responds_while_another_process_has_the_lock_of_a_quota(serve: Serve, tmp_path: Path) -> None:
    """As a worker that is stopped there: it must not stop the others."""
    levels = SharedLevels.create()
    key = "the-key-of-a-lovelace"
    (tmp_path / "keys").write_text(f"{key} ada 1e-9\n")
    request = {"json": {"inputs": [{"word": "one"}]}, "headers": {"Authorization": f"Bearer {key}"}}
    with (
        serve(quotas=levels, api_keys_file=tmp_path / "keys", max_items=500) as client,
        process(HOLD, levels, sha256(key.encode()).digest()) as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            held = pool.submit(client.post, "/embed", **request)
            with pytest.raises(TimeoutError):
                held.result(timeout=0.5)
            assert client.get("/livez", timeout=10).status_code == 200
        finally:
            holder.kill()
        assert held.result(timeout=60).status_code == 200


def test_event_loop_never_waits_for_a_quota(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = SharedLevels.create()
    locked, calls = levels.locked, []

    def busy(offset: int, *, blocking: bool) -> contextlib.AbstractContextManager[None]:
        calls.append((blocking, threading.get_ident()))
        if not blocking:
            raise BlockingIOError
        return locked(offset, blocking=True)

    monkeypatch.setattr(levels, "locked", busy)
    key = "the-key-of-a-lovelace"
    (tmp_path / "keys").write_text(f"{key} ada 1e-9\n")
    with serve(quotas=levels, api_keys_file=tmp_path / "keys", max_items=2) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        statuses = [client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429], "each item is charged once"
    check, charge = [False, True], [False, True]
    assert [blocking for blocking, _ in calls] == [*check, *charge, *check, *charge, *check]
    (loop,) = {thread for blocking, thread in calls if not blocking}
    assert loop not in {thread for blocking, thread in calls if blocking}


def test_quotas_of_different_keys_and_rates_are_different() -> None:
    levels = SharedLevels.create()
    buckets = [TokenBucket(rate, 2, levels, key) for rate in (0.1, 0.2) for key in (b"ada", b"grace")]
    for bucket in buckets:
        assert bucket.take(2) == 0
        assert bucket.take(1) > 0


def test_key_file_with_more_quotas_than_slots_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_quotas, "SLOTS", 2)
    file = tmp_path / "keys"
    file.write_text("".join(f"{name * 20} {name} 5\n" for name in "abc"))
    with pytest.raises(ApiKeysError, match="2 different quotas"):
        ApiKeys(file, 32, SharedLevels.create())
