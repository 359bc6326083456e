"""Reads the TOML file of a configuration. All errors are reported at once, each with its place in the file."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from concord.model.modality import EncodedModality
from concord.training.config import Config, rename_keys
from concord.training.errors import ConfigError


def read(path: Path) -> Config:
    """Read and validate a configuration.

    A file may extend another: ``extends`` is its path, relative to the folder of the file. Keys of the file override those of
    the other, table by table. Lists are replaced as a whole.

    Raises:
        ConfigError: the file cannot be read or is not TOML, a key is unknown, a value is not allowed, or tables contradict
            each other.
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
        raise ConfigError(f"{path}: extends itself, through {' and '.join(other.name for other in extending)}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a TOML or a UTF-8 error
        raise ConfigError(f"{path}: not TOML ({error})") from error
    try:
        tables = rename_keys(tables, str(path))  # in each file, so that a file with new keys may extend one with old keys
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if (base := tables.pop("extends", None)) is None:
        return tables
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: the name of another configuration is expected, received {base!r}")
    return _merge(_tables(path.parent / base, (*extending, path.resolve())), tables)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` overridden by ``changes``, recursively for tables."""
    nested = {key for key in changes.keys() & base.keys() if isinstance(changes[key], dict) and isinstance(base[key], dict)}
    return {**base, **changes, **{key: _merge(base[key], changes[key]) for key in nested}}


def _describe(kind: str, location: tuple[str | int, ...], message: str, received: object) -> str:
    """Return one line for an error of pydantic: its place, what is allowed and what was received."""
    tables, path = _resolve(location[:-1] if kind == "extra_forbidden" else location)
    if kind == "extra_forbidden":
        key = str(location[-1])
        allowed = sorted({name for table in tables for name in table.model_fields})
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{'.'.join([*path, key])}: unknown key: {hint}Allowed: {', '.join(allowed)}"
    message = message.removeprefix("Value error, ")
    if kind == "kind" and isinstance(received, dict):
        received = received.get("kind")
    if isinstance(received, dict | list) or kind == "missing":
        return f"{'.'.join(path)}: {message}" if path else message
    return f"{'.'.join(path)}: {message}, received {received!r}"


def _resolve(location: tuple[str | int, ...]) -> tuple[list[type[BaseModel]], list[str]]:
    """Return the models at a pydantic location, and its path in the notation of the TOML file.

    pydantic puts the tag of a union (``image``, ``Hub``) into the location. A tag is not a key and is left out of the path.
    """
    tables: list[type[BaseModel]] = [Config]
    path: list[str] = []
    for part in location:
        if isinstance(part, int):
            path[-1] += f"[{part}]"
            continue
        fields = [table.model_fields[part] for table in tables if part in table.model_fields]
        tagged = [t for t in tables if "kind" in t.model_fields and t.model_fields["kind"].default == part]
        tagged = [EncodedModality] if part == "encoded" else tagged
        if fields:
            path.append(part)
            tables = [table for field in fields for table in _models_in(field.annotation)]
        elif tagged:
            tables = tagged
        elif part not in ("Path", "Hub"):
            path.append(part)  # a key of a mapping with free keys, such as columns
    return tables, path


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that occur in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _models_in(argument)]
