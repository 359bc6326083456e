"""The TOML file of a configuration, checked whole before any work begins: every mistake is told with its place."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from training.config import Config, ConfigError


def read(path: Path) -> Config:
    """Read and check a configuration. A file that ``extends`` another, named from its own folder, says what differs: its keys
    come before those of the other, table by table; lists are replaced whole.

    Raises:
        ConfigError: no file, no TOML, an unknown key, a value that is not allowed, or parts that disagree.
    """
    try:
        return Config.model_validate(_tables(path, ()))
    except ValidationError as error:
        problems = "\n".join(
            f"  {_describe(problem['type'], problem['loc'], problem['msg'], problem['input'])}" for problem in error.errors()
        )
        raise ConfigError(f"{path}:\n{problems}") from error


def _tables(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in extending:
        raise ConfigError(f"{path}: extends itself, by way of {' and '.join(other.name for other in extending)}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a TOML or a UTF-8 error
        raise ConfigError(f"{path}: not TOML ({error})") from error
    if (other := tables.pop("extends", None)) is None:
        return tables
    if not isinstance(other, str):
        raise ConfigError(f"{path}: extends: the name of another configuration is expected, received {other!r}")
    return _over(tables, _tables(path.parent / other, (*extending, path.resolve())))


def _over(tables: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in tables.keys() & others.keys() if isinstance(tables[key], dict) and isinstance(others[key], dict)}
    return {**others, **tables, **{key: _over(tables[key], others[key]) for key in both}}


def _describe(kind: str, location: tuple[str | int, ...], message: str, received: object) -> str:
    tables, path = _follow(location[:-1] if kind == "extra_forbidden" else location)
    if kind == "extra_forbidden":
        key = str(location[-1])
        allowed = sorted({name for table in tables for name in table.model_fields})
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{'.'.join([*path, key])}: unknown key: {hint}Allowed: {', '.join(allowed)}"
    message = message.removeprefix("Value error, ")
    if isinstance(received, dict | list) or kind == "missing":
        return f"{'.'.join(path)}: {message}" if path else message
    return f"{'.'.join(path)}: {message}, received {received!r}"


def _follow(location: tuple[str | int, ...]) -> tuple[list[type[BaseModel]], list[str]]:
    """The tables that a pydantic location leads to, and the place as the file's author would write it.

    pydantic puts the tag of a union (``image``, ``Hub``) into the location; it names no key and is left out of the place.
    """
    tables: list[type[BaseModel]] = [Config]
    path: list[str] = []
    for part in location:
        if isinstance(part, int):
            path[-1] += f"[{part}]"
            continue
        fields = [table.model_fields[part] for table in tables if part in table.model_fields]
        tagged = [t for t in tables if "kind" in t.model_fields and t.model_fields["kind"].default == part]
        if fields:
            path.append(part)
            tables = [table for field in fields for table in _within(field.annotation)]
        elif tagged:
            tables = tagged
        elif part not in ("Path", "Hub"):
            path.append(part)  # a key of a free mapping, such as columns
    return tables, path


def _within(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _within(argument)]
