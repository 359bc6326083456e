"""The arrows between packages and rooms, read from their imports."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from concord.training.cli import app as training_app
from tests.architecture.imports import FILES, MODULES, PACKAGES, imports, module_of, room_graph
from tests.support.server import ROOT

HEAVY = {"torch", "onnxscript", "datasets", "sklearn"}
NEEDS_NO_TORCH = [
    file
    for file in FILES
    if module_of(file).startswith(("concord.model", "concord.service", "concord.client"))
    and not module_of(file).startswith("concord.model.vae")
] + [ROOT / "training" / name for name in ("__init__.py", "cli.py", "config.py", "errors.py")]


def ours(file: Path) -> set[str]:
    return {name for name in imports(file) if name.startswith("concord.")}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_package_imports_only_what_its_arrow_allows(file: Path) -> None:
    package = module_of(file).split(".")[1]
    allowed = {
        "client": {"client"},
        "model": {"model"},
        "service": {"service", "model"},
        "training": {"training", "model"},
    }
    assert {name.split(".")[1] for name in ours(file)} <= allowed[package]


@pytest.mark.parametrize("file", NEEDS_NO_TORCH, ids=module_of)
def test_serving_imports_no_torch(file: Path) -> None:
    names = imports(file)
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not [name for name in names if name.startswith("concord.model.vae")]


def test_server_process_loads_no_training_library() -> None:
    script = f"import sys, concord.service.cli; print(*(sys.modules.keys() & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60, cwd=ROOT, text=True)
    assert done.stdout.strip() == ""


def test_training_commands_load_no_library_of_export_and_metrics() -> None:
    """They would take 200 MiB in init, check and fit. Commands that need them import them."""
    libraries = {"datasets", "onnx_ir", "onnxruntime", "onnxscript", "pandas", "scipy", "sklearn"}
    script = f"import sys, concord.training.commands; print(*(sys.modules.keys() & {libraries!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60, cwd=ROOT, text=True)
    assert done.stdout.strip() == ""


def test_training_commands_run_without_the_service() -> None:
    """The packages of the service would take 60 MiB of memory during a training."""
    commands = {command.name or command.callback.__name__ for command in training_app.registered_commands}
    assert {point.name for point in entry_points(group="concord.commands")} == commands
    script = (
        "import sys; from concord.service.__main__ import main; sys.argv = ['concord', 'check', '-h']\n"
        "try: main()\n"
        "except SystemExit: print(*(sys.modules.keys() & {'fastapi', 'onnxruntime', 'uvicorn', 'concord.service.cli'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60, cwd=ROOT, text=True)
    assert done.stdout.splitlines()[-1].strip() == "", done.stdout


def test_client_imports_httpx_and_numpy_alone() -> None:
    allowed = {*sys.stdlib_module_names, "httpx", "numpy", "concord", "PIL"}  # Pillow where pictures are sent or received
    for name, file in MODULES.items():
        if name.startswith("concord.client"):
            assert {imported.partition(".")[0] for imported in imports(file)} <= allowed, name
            assert "PIL" not in {imported.partition(".")[0] for imported in imports(file, lazy=False)}, name


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_onnx_runtime_is_imported_in_one_folder(file: Path) -> None:
    """Where its telemetry is switched off first: ``model/__init__.py`` does that before anything else is imported."""
    assert file.is_relative_to(ROOT / "model/runtime") or "onnxruntime" not in {n.partition(".")[0] for n in imports(file)}


@pytest.mark.parametrize("file", [file for file in FILES if file.is_relative_to(ROOT / "service")], ids=module_of)
def test_service_uses_monotonic_clocks(file: Path) -> None:
    """Durations and deadlines come from clocks that only go forward; ``time_ns`` is for the timestamps of spans."""
    attributes = {ast.unparse(node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert not attributes & {"time.time", "datetime.now", "datetime.utcnow", "datetime.today"}
    assert "time.time" not in imports(file)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in the graph; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                if found := visit(imported, (*path, name)):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, ()))), [])


def test_circle_finder_finds_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_import_each_other_in_no_circle() -> None:
    assert circle({name: ours(file) & MODULES.keys() - {name} for name, file in MODULES.items()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_each_other_in_no_circle(package: str) -> None:
    assert circle(room_graph(package)) == []


ROOMS = {
    "api": {"errors", "inference", "request_state", "settings", "telemetry", "workers"},
    "http": {"errors", "request_state", "settings", "telemetry"},
    "inference": {"settings"},
    "telemetry": {"errors", "inference", "request_state", "settings"},
    "batch": {"inference", "settings"},
    "page": {"api", "errors", "inference"},
    "workers": {"http", "inference", "settings"},
    "errors": {"request_state"},
    "request_state": set[str](),
    "settings": set[str](),
}
"""What each room of the service may import of the service. app, cli, worker and __main__ compose them."""


@pytest.mark.parametrize("room", ROOMS)
def test_service_room_imports_only_what_is_allowed(room: str) -> None:
    imported = {name.removeprefix("concord.service.") for name in room_graph("service")[f"concord.service.{room}"]}
    assert imported <= ROOMS[room]


def test_inference_knows_nothing_of_http() -> None:
    for module, file in MODULES.items():
        if module.startswith("concord.service.inference"):
            assert not {name.partition(".")[0] for name in imports(file)} & {
                "starlette",
                "fastapi",
                "uvicorn",
                "prometheus_client",
            }


def test_metrics_know_nothing_of_inference() -> None:
    assert ours(MODULES["concord.service.telemetry.metrics"]) == set()


def test_authentication_gets_its_open_paths_from_the_app() -> None:
    assert "concord.service.api.health" not in ours(MODULES["concord.service.http.auth"])


def test_training_configuration_imports_no_data_code() -> None:
    names = ours(MODULES["concord.training.config"])
    assert not {name for name in names if name.startswith("concord.training.data")}


def test_every_package_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert listed == sorted(
        {module_of(file) if file.name == "__init__.py" else module_of(file).rpartition(".")[0] for file in FILES}
    )
