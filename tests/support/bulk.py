"""Bulk jobs without Ray."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import concord.service.batch
from concord.service.batch.dataset import Done, Embedder


def run_serially(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``embed-dataset`` process its parts one after the other in this process, in place of Ray's workers."""

    def run(job: Any, parts: Any, source: str, output: str, **_: Any) -> Iterator[Done]:
        embedder = Embedder(job, source, output)
        yield from map(embedder.process, parts)

    serial: Any = types.ModuleType("concord.service.batch.ray_job")
    serial.run = run
    monkeypatch.setitem(sys.modules, serial.__name__, serial)
    monkeypatch.setattr(concord.service.batch, "ray_job", serial, raising=False)
