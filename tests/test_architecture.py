"""The arrows between the packages, read from their imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for package in ("model", "service", "training") for file in (ROOT / package).rglob("*.py"))
SERVES = [file for file in FILES if file.parent == ROOT / "model" or "service" in file.relative_to(ROOT).parts]
HEAVY = {"torch", "onnxscript", "datasets", "sklearn"}


def imports(file: Path) -> set[str]:
    """Every module a file imports, at any depth of the code, as a dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the arrows"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=named)
def test_the_arrows(file: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(file)}
    forbidden = {"model": {"service", "training"}, "service": {"training"}, "training": {"service"}}
    assert not roots & forbidden[file.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("file", SERVES, ids=named)
def test_what_serves_needs_no_torch(file: Path) -> None:
    """The service, and of model everything outside model/vae."""
    names = imports(file)
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not [name for name in names if name.startswith("model.vae")]


def test_the_service_starts_without_what_only_training_needs() -> None:
    script = f"import sys, service.__main__; print(*(sys.modules.keys() & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60, cwd=ROOT, text=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("file", FILES, ids=named)
def test_one_door_to_onnx_runtime(file: Path) -> None:
    """Where its telemetry is switched off first: ``model/__init__.py`` says so before anything else is imported."""
    assert file == ROOT / "model" / "runtime.py" or "onnxruntime" not in {name.partition(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "service"], ids=named)
def test_no_clock_that_can_jump(file: Path) -> None:
    """Durations and deadlines come from clocks that only go forward; ``time_ns`` is for the timestamps of spans."""
    attributes = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert not attributes & {"time.time", "datetime.now", "datetime.utcnow", "datetime.today"}
    assert "time.time" not in imports(file)
