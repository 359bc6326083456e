"""Quotas in shared memory: counted once by several processes, and not blocked by one that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from concord.service.http import shared_quotas
from concord.service.http.api_keys import ApiKeys, ApiKeysError, TokenBucket
from concord.service.http.shared_quotas import SharedLevels
from tests.support.server import ROOT

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

bucket = TokenBucket(1e-9, 500, SharedLevels(int(sys.argv[1])), b"ada")
with bucket._level.locked():
    print("held", flush=True)
    time.sleep(600)
"""


def process(script: str, levels: SharedLevels) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, str(levels.descriptor)]
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
        holder.send_signal(signal.SIGKILL)
    assert TokenBucket(1e-9, 500, levels, b"ada").take(500) == 0


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
