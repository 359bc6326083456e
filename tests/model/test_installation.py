"""The command that installs optional packages names what Concord was installed from."""

import json
import shlex
import sys
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

from concord.model import installation
from concord.model.installation import install_command
from tests.support.server import ROOT


@pytest.fixture
def installed_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Pretend that Concord is no checkout, and that pip recorded this URL; None: no record."""

    class Recorded(Distribution):
        url: str | None

        def read_text(self, filename: str) -> str | None:
            assert filename == "direct_url.json"
            return None if self.url is None else json.dumps({"url": self.url})

        def locate_file(self, path: Any) -> Any:
            raise NotImplementedError

    def record(url: str | None) -> None:
        recorded = Recorded()
        recorded.url = url
        monkeypatch.setattr(installation, "distribution", lambda name: {"concord-mvae": recorded}[name])

    monkeypatch.setattr(installation, "_ROOT", tmp_path / "site-packages")
    return record


def words(extras: str) -> list[str]:
    """The words of the command after those that every command has."""
    python, *command = shlex.split(install_command(extras))
    assert python == sys.executable
    assert command[:3] == ["-m", "pip", "install"]
    return command[3:]


def test_command_of_a_checkout_names_its_folder() -> None:
    assert words("cpu,train") == ["--editable", f"{ROOT}[cpu,train]"]


def test_command_names_the_folder_that_pip_installed(installed_from: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my concord"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    installed_from(folder.as_uri())
    assert words("train") == [f"{folder}[train]"]


@pytest.mark.parametrize("url", [None, "https://example.org/concord.zip", "file:///gone/concord"])
def test_command_names_the_package_without_a_folder(installed_from: Any, url: str | None) -> None:
    installed_from(url)
    assert words("train") == ["concord-mvae[train]"]
