"""Commands whose packages are missing say what to run."""

import subprocess
import sys
from pathlib import Path

import pytest

from concord.model.installation import install_command
from tests.support.server import ROOT


@pytest.mark.parametrize(
    ("missing", "command", "extras"),
    [
        (("torch",), "init", "train"),
        (("torch", "onnxruntime"), "init", "cpu,train"),
        (("typer",), "init", "cpu,train"),
        (("typer",), "serve", "cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_command_without_its_packages_names_what_to_install(
    missing: tuple[str, ...], command: str, extras: str, tmp_path: Path
) -> None:
    script = f"""
import importlib.abc, importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name in {missing} else find_spec(name, *package)
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["concord", {command!r}, {str(tmp_path / "shop.parquet")!r}]
from concord.service.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=60, cwd=ROOT, text=True)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "is not installed" in done.stderr
    assert install_command(extras) in done.stderr
