"""The README's commands and their answers. Run as a program, it asks a service of its own and writes the answers anew."""

import re
import shlex
import subprocess
from dataclasses import dataclass

from tests.server import ROOT, running

README = ROOT / "README.md"
ADDRESS = "localhost:8000"
_EXAMPLE = re.compile(r"```console\n\$ (?P<command>curl [^\n]+)\n(?P<answer>[^`]*)```")


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


def main() -> None:
    """Write the answers into the README."""
    with running() as service:
        text = _EXAMPLE.sub(
            lambda m: f"```console\n$ {m['command']}\n{Example(m['command'], '').run(service.address).strip()}\n```",
            README.read_text(encoding="utf-8"),
        )
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
