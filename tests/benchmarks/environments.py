"""Virtual environments of the competitors, below .venv-bench. Built at first use, and again when the packages change."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.support.server import ROOT

FOLDER = ROOT / ".venv-bench"
MODEL_PACKAGES = ("jaxtyping", "numpy", "onnx", "onnxruntime", "orjson", "pillow", "pydantic", "regex")
"""Packages that ``competitors.digits`` imports, most of them through ``concord.model``."""


def interpreter(name: str, packages: Sequence[str]) -> Path:
    """Return the Python of an environment with these packages, the MODEL_PACKAGES and an editable install of Concord.

    The MODEL_PACKAGES have the versions that pyproject.toml requires. Concord is installed without extras, so the
    environment lacks the packages of its server.

    Args:
        name: of the environment's folder.
        packages: requirements as pip takes them.

    Raises:
        subprocess.CalledProcessError: pip cannot install the packages. Its output says why.
    """
    folder = FOLDER / name
    python, stamp = folder / "bin/python", folder / ".packages"
    requirements = [*packages, *model_requirements()]
    expected = "\n".join([*requirements, *_package_folders()])
    if not stamp.is_file() or stamp.read_text() != expected:
        print(f"installing {' '.join(packages)} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements, "--editable", str(ROOT)], check=True)
        stamp.write_text(expected)
    return python


def model_requirements() -> list[str]:
    """Return the requirements of the MODEL_PACKAGES from pyproject.toml: dependencies and the extras ``server`` and ``cpu``.

    Raises:
        KeyError: pyproject.toml does not require one of the packages.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines: list[str] = [*project["dependencies"], *extras["server"], *extras["cpu"]]
    by_name = {re.split(r"[^\w.-]", line, maxsplit=1)[0]: line for line in lines}
    return [by_name[package] for package in MODEL_PACKAGES]


def _package_folders() -> list[str]:
    """Return the importable names and their folders. An editable install records them once."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return [f"{name} = {folder}" for name, folder in setuptools["package-dir"].items()]
