"""The README's commands and their answers. Run as a program, it asks a service of its own and writes the answers anew."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ADDRESS = "localhost:8000"
_EXAMPLE = re.compile(r"```console\n\$ (?P<command>curl [^\n]+)\n(?P<answer>[^`]*)```")
START_SECONDS = 60


@dataclass(frozen=True)
class Example:
    """One curl line of the README and what stands below it."""

    command: str
    answer: str

    def run(self, address: str) -> str:
        """The answer of the service at ``address`` (host:port)."""
        words = shlex.split(self.command.replace(ADDRESS, address))
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout


def examples() -> list[Example]:
    """All of them, in the README's order."""
    return [Example(m["command"], m["answer"].strip()) for m in _EXAMPLE.finditer(README.read_text(encoding="utf-8"))]


@contextmanager
def running_service() -> Iterator[str]:
    """A service with the built-in bundle on a free port; yields host:port."""
    command = [sys.executable, "-m", "service", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CONCORD_")} | {"CONCORD_LOG_FORMAT": "json"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r'"port": (\d+)', process.stdout.readline())
            assert found, "the service did not say where it listens"
            address = f"127.0.0.1:{found[1]}"
            _wait_until_ready(address)
            yield address
        finally:
            process.terminate()


def _wait_until_ready(address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(["curl", "-sf", f"{address}/readyz"], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the service is not ready"
        time.sleep(0.1)


def main() -> None:
    """Write the answers into the README."""
    with running_service() as address:
        text = _EXAMPLE.sub(
            lambda m: f"```console\n$ {m['command']}\n{Example(m['command'], '').run(address).strip()}\n```",
            README.read_text(encoding="utf-8"),
        )
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
