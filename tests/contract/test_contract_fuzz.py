"""schemathesis against a running service, with all of its checks. ``make fuzz`` runs it for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.metrics import scrape
from tests.support.server import ROOT, running

pytestmark = pytest.mark.slow

EXAMPLES = 25
SLOW_SECONDS = 20
"""Longest response time: twice the deadline that tests.support.fuzzing sets."""
KEY = {"Authorization": "Bearer the-key-of-a-lovelace"}


def fuzz(address: str, folder: Path, *options: str) -> None:
    """Run schemathesis in ``folder``, and fail if it finds a failure."""
    url = f"http://{address}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--continue-on-failure", *options]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.support.fuzzing", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_fuzzed_service_conforms_to_its_document(tmp_path: Path) -> None:
    options = ("--max-examples", str(EXAMPLES), "--seed", "1", "--max-response-time", str(SLOW_SECONDS))
    with running() as service:
        fuzz(service.address, tmp_path, *options)
        for status in ("200", "400", "404", "405", "415", "422"):
            count = scrape(service.client, "concord_request_duration_seconds_count", status=status)
            assert count > 0, f"the requests were not varied: none got {status}"
        text = service.client.get("/metrics").text
        statuses = {line.partition('status="')[2][:3] for line in text.splitlines() if "duration_seconds_count{" in line}
        assert not any(status >= "500" for status in statuses)
        assert not [line for line in service.log_lines() if line["level"] in {"error", "critical"}]


def test_fuzzed_service_requires_keys_where_its_document_says(tmp_path: Path) -> None:
    """The check is ignored_auth. Requests with the key succeed."""
    (tmp_path / "keys").write_text("the-key-of-a-lovelace\n")
    (header,) = (f"{name}: {value}" for name, value in KEY.items())
    options = ("--header", header, "--phases", "examples,fuzzing", "--max-examples", "5", "--checks", "ignored_auth")
    with running(CONCORD_API_KEYS_FILE=str(tmp_path / "keys")) as service:
        fuzz(service.address, tmp_path, *options)
        service.client.headers.update(KEY)
        for status in ("200", "401", "403"):
            labels = {"route": "/embed", "status": status}
            assert scrape(service.client, "concord_request_duration_seconds_count", **labels) > 0, status
