"""The supervisor where a worker cannot be started, or hangs while it starts."""

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from concord.service.http.acceptor import ConnectionCounts
from concord.service.settings import Settings
from concord.service.workers import supervisor
from concord.service.workers.supervisor import Supervisor


def run_supervisor() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        descriptor = ConnectionCounts.create(2)
        settings = Settings(workers="2")
        counts = ConnectionCounts(descriptor)
        return asyncio.run(Supervisor(settings, settings, 2, listener, None, {"connections": descriptor}, counts).run())


def test_service_ends_with_an_error_if_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert run_supervisor() == supervisor.FAILED


def test_worker_that_hangs_while_it_starts_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.2)
    assert run_supervisor() == supervisor.FAILED
