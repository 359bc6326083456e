"""The modules of the packages and what each of them imports, read from the source."""

import ast
from functools import cache
from pathlib import Path

from tests.support.server import ROOT

PACKAGES = ("model", "service", "training")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def module_of(file: Path) -> str:
    """Dotted name of a file, as it is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("concord", *(parts[1:] if parts[:2] == ("service", "client") else parts)))


MODULES = {module_of(file): file for file in FILES}


@cache
def imports(file: Path, *, lazy: bool = True) -> frozenset[str]:
    """Modules that a file imports: of ours the module, of others the dotted name.

    Args:
        lazy: imports inside functions count too.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide what depends on what"
            names |= {_module(f"{node.module}.{alias.name}") for alias in node.names}
    return frozenset(names)


def _at_import(tree: ast.Module) -> list[ast.AST]:
    """Nodes that run when the module is imported; a block for the type checker does not."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                found.append(node)
                waiting.append(node)
    return found


def _module(name: str) -> str:
    """The module that holds ``name``, where it is one of ours."""
    parent = name.rpartition(".")[0]
    return parent if name.startswith("concord.") and name not in MODULES and parent in MODULES else name


def room_of(module: str) -> str:
    """The folder or file directly below its package that holds a module: ``concord.service.api``."""
    return ".".join(module.split(".")[:3])


def room_graph(package: str) -> dict[str, set[str]]:
    """The rooms of a package, each with the other rooms of the package that it imports."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        if module.startswith(f"concord.{package}."):
            imported = {room_of(name) for name in imports(file) if name.startswith(f"concord.{package}.")}
            graph.setdefault(room_of(module), set()).update(imported - {room_of(module)})
    return graph
