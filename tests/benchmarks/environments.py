"""A virtual environment for each rival, below .venv-bench, made when it is first needed and whenever its packages change."""

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.server import ROOT

FOLDER = ROOT / ".venv-bench"
MODEL = ("jaxtyping", "numpy", "onnx", "orjson", "pillow", "pydantic", "safetensors")
"""What the NumPy half of ``model`` imports, beside ONNX Runtime: the rivals decode with it."""


def python(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment that holds these packages and what ``model`` needs, of the versions it needs.

    Raises:
        subprocess.CalledProcessError: they cannot be installed; pip has said why.
    """
    folder = FOLDER / name
    interpreter, stamp = folder / "bin/python", folder / ".packages"
    wanted = [*packages, *_of_model()]
    if not stamp.is_file() or stamp.read_text() != "\n".join(wanted):
        print(f"installing {' '.join(packages)} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True)
        stamp.write_text("\n".join(wanted))
    return interpreter


def _of_model() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [line for line in pinned if line.startswith((*MODEL, "onnxruntime"))]
