"""The command that adds optional packages to this installation of Concord, and the message that names it."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "concord-mvae"
_ROOT = Path(__file__).resolve().parents[1]


def install_command(extras: str) -> str:
    """Return the command for a shell that installs ``extras``, separated by commas, for the Python that runs now.

    It names the folder that Concord was installed from. Without one, for example after an installation from a package index,
    it names the package.
    """
    if (_ROOT / "pyproject.toml").is_file():  # a checkout, which an editable installation imports from
        source = ["--editable", f"{_ROOT}[{extras}]"]
    else:
        source = [f"{_installed_from() or NAME}[{extras}]"]
    return shlex.join([sys.executable, "-m", "pip", "install", *source])


def not_installed(package: str, user: str, extras: str) -> str:
    """Return the message for a missing package: what needs it, and how to install it."""
    return f"{package} is not installed. {user} needs it: {install_command(extras)}"


def _installed_from() -> Path | None:
    """The folder that pip installed from, as it recorded it (PEP 610). None: another source, or the folder is gone."""
    try:
        record = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    url = urlsplit(json.loads(record)["url"] if record else "")
    folder = Path(url2pathname(url.path))
    return folder if url.scheme == "file" and (folder / "pyproject.toml").is_file() else None
