"""The documents: their examples, Python blocks, links and generated sections."""

import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from concord.model import bundle
from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.errors import CODES
from concord.service.settings import PREFIX, Settings
from tests.support.server import ROOT

README = ROOT / "README.md"
SERVICE_README = ROOT / "service" / "README.md"
ADDRESS = "localhost:8000"
_REQUEST_ID = re.compile(r"urn:request:[0-9a-f]+")
_EXAMPLE = re.compile(r"```console\n\$ (?P<command>curl [^\n]+)\n(?P<response>[^`]*)```")


def documents() -> list[Path]:
    """Every Markdown document of the repository, but the model cards, which export writes."""
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    found = [ROOT / file for file in files] or [file for file in ROOT.rglob("*.md") if ".venv" not in file.parts]
    return [file for file in found if file.parent.parent != ROOT / "model" / "bundles"]


@dataclass(frozen=True)
class Example:
    """One curl command of a document and the response below it."""

    command: str
    response: str

    @property
    def bundle(self) -> str:
        """Name of the built-in bundle that gives the response: the model that it names."""
        named = re.search(r'"model":"([^"]+)"', self.response)
        return named[1] if named else bundle.DEFAULT_BUNDLE

    def run(self, address: str) -> str:
        """The response of the service at ``address`` (host:port)."""
        words = shlex.split(self.command.replace(ADDRESS, address))
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout


def examples(document: Path) -> list[Example]:
    """The examples of a document that show a response, in its order."""
    return [Example(m["command"], m["response"].strip()) for m in _EXAMPLE.finditer(document.read_text(encoding="utf-8"))]


def with_responses(text: str, addresses: Mapping[str, str]) -> str:
    """The document with the responses of services in its examples. A new request id alone changes nothing.

    Args:
        addresses: of the services, host:port, by bundle.
    """

    def run(match: re.Match[str]) -> str:
        example = Example(match["command"], match["response"])
        response = example.run(addresses[example.bundle]).strip()
        if _REQUEST_ID.sub("", response) == _REQUEST_ID.sub("", match["response"].strip()):
            return match[0]
        return f"```console\n$ {match['command']}\n{response}\n```"

    return _EXAMPLE.sub(run, text)


def python_blocks(document: Path) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def settings_table() -> str:
    """Markdown of all settings."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = (
            "" if default is None or default == () else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        )
        lines.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(lines)


def errors_table() -> str:
    """Markdown of all error codes."""
    lines = ["| status | codes |", "| --- | --- |"]
    for status in sorted({status for status, _ in CODES.values()}):
        codes = ", ".join(f"`{code}` ({title})" for code, (own, title) in CODES.items() if own == status)
        lines.append(f"| {status} | {codes} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Markdown of the metrics of a service of the built-in bundle. The names of labels are those of its samples."""
    app = create([Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), fixed_batches=True)], Settings())
    app.state.metrics.stage("encode", 0.0)
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in app.state.metrics.registry.collect():
        if family.name.startswith("process_"):  # those of every Prometheus client
            continue
        assert family.samples, f"{family.name} has no sample, so its labels are unknown"
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        names = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {names} | {family.documentation} |")
    return "\n".join(lines)


SECTIONS: dict[tuple[Path, str], Callable[[], str]] = {
    (SERVICE_README, "settings"): settings_table,
    (SERVICE_README, "errors"): errors_table,
    (SERVICE_README, "metrics"): metrics_table,
}
"""Generated sections by document and marker. ``concord report`` and ``make bench`` write the others."""


def section(text: str, name: str) -> str:
    """What stands between the markers of a section."""
    found = re.search(f"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)
    assert found, f"the markers of {name} are missing"
    return found[1]


def with_section(text: str, name: str, content: str) -> str:
    """The document with another content between the markers of a section."""
    section(text, name)
    return re.sub(
        f"<!-- {name} -->.*<!-- /{name} -->", lambda _: f"<!-- {name} -->\n{content}\n<!-- /{name} -->", text, flags=re.DOTALL
    )
