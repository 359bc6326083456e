"""schemathesis against a running service, with every check it knows; ``make fuzz`` is the long run."""

import os
import subprocess
import sys
from pathlib import Path

from tests.server import ROOT, running

EXAMPLES = 25
SLOW_SECONDS = 5


def fuzz(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--continue-on-failure", *options]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzzing", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_service_is_as_its_document_says(tmp_path: Path) -> None:
    with running() as service:
        done = fuzz(
            f"http://{service.address}",
            tmp_path,
            "--max-examples",
            str(EXAMPLES),
            "--seed",
            "1",
            "--max-response-time",
            str(SLOW_SECONDS),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        counted = service.client.get("/metrics").text
        answered = {line.partition('status="')[2][:3] for line in counted.splitlines() if "duration_seconds_count{" in line}
        assert {"200", "400", "404", "405", "415", "422"} <= answered, "it was not fuzzed in earnest"
        assert not any(status >= "500" for status in answered)
        assert not [line for line in service.lines() if line["level"] in {"error", "critical"}]


def test_keys_are_asked_for_wherever_the_document_says(tmp_path: Path) -> None:
    """The check named ignored_auth, and that all goes on with a key."""
    (tmp_path / "keys").write_text("the-key-of-a-lovelace\n")
    with running(CONCORD_API_KEYS_FILE=str(tmp_path / "keys")) as service:
        key = "Authorization: Bearer the-key-of-a-lovelace"
        options = ("--header", key, "--phases", "examples,fuzzing", "--max-examples", "5", "--checks", "ignored_auth")
        done = fuzz(f"http://{service.address}", tmp_path, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        counted = service.client.get("/metrics", headers={"Authorization": "Bearer the-key-of-a-lovelace"}).text
        assert all(f'route="/embed",status="{status}"' in counted for status in (200, 401, 403))
