"""Who is compared, in which configurations, and how each is spoken to."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks import environments
from tests.benchmarks.process import Process, free_ports, running
from tests.traffic import post

Item = Mapping[str, str]
Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class Contestant:
    """A server of embeddings.

    Args:
        command: after the interpreter.
        packages: of an environment of its own; none: it runs in ours.
        variants: its settings, as environment variables, from which the best are chosen.
        body: what asks for the embeddings of these items.
        vectors: those in the answer, (items, latent).
    """

    name: str
    title: str
    command: Sequence[str]
    path: str
    ready: str
    body: Callable[[Sequence[Item]], dict[str, Any]]
    vectors: Callable[[dict[str, Any]], Any]
    packages: Sequence[str] = ()
    variants: Sequence[Mapping[str, str]] = field(default=({},))

    def requests(self, items: Sequence[Item]) -> list[bytes]:
        """One for each item."""
        return [post(self.path, self.body([item])) for item in items]

    def read(self, answer: bytes) -> Vectors:
        return np.array(self.vectors(json.loads(answer)), dtype=np.float64)

    def python(self) -> Path:
        return environments.python(self.name, self.packages) if self.packages else Path(sys.executable)

    def running(self, variant: Mapping[str, str]) -> AbstractContextManager[Process]:
        """It, ready, with these settings."""
        port, *more = free_ports(3)
        python = self.python()
        ports = {"PORT": str(port), "PORT_2": str(more[0]), "PORT_3": str(more[1])}
        words = [word.format(port=port, bin=python.parent) for word in self.command]
        command = words if words[0].startswith("/") else [str(python), *words]
        path = {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin"}
        return running(command, {**path, **ports, **variant}, port, self.ready)


def _variants(**choices: Sequence[object]) -> list[dict[str, str]]:
    """Every combination."""
    found: list[dict[str, str]] = [{}]
    for name, values in choices.items():
        found = [{**one, name: str(value)} for one in found for value in values]
    return found


def _inputs(items: Sequence[Item]) -> dict[str, Any]:
    return {"inputs": [dict(item) for item in items]}


def _columns(items: Sequence[Item]) -> dict[str, Any]:
    """The V2 inference protocol: a tensor for each modality."""
    return {
        "inputs": [
            {"name": name, "datatype": "BYTES", "shape": [len(items), 1], "data": [item[name] for item in items]}
            for name in items[0]
        ]
    }


def _uvicorn(title: str, name: str, variants: Sequence[Mapping[str, str]]) -> Contestant:
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "error", "--port", "{port}"]
    return Contestant(
        name=name,
        title=title,
        command=["-m", "uvicorn", "tests.benchmarks.peers.plain:app", *options],
        path="/embed",
        ready="/ready",
        body=_inputs,
        vectors=lambda answer: answer["embeddings"],
        variants=variants,
    )


OURS = Contestant(
    name="concord",
    title="Concord",
    command=["-m", "service", "--port", "{port}"],
    path="/embed",
    ready="/readyz",
    body=_inputs,
    vectors=lambda answer: [one["embedding"] for one in answer["data"]],
)
PLAIN = _uvicorn("FastAPI, no batching", "fastapi", [{"HANDLER": "thread"}, {"HANDLER": "async"}])
NOOP = _uvicorn("no-op route", "noop", [{"HANDLER": "noop"}])
PEERS = (
    Contestant(
        name="litserve",
        title="LitServe",
        packages=["litserve==0.2.19"],
        command=["-m", "tests.benchmarks.peers.litserve"],
        path="/predict",
        ready="/health",
        body=lambda items: dict(items[0]),
        vectors=lambda answer: [answer["embedding"]],
        variants=[
            *_variants(BATCH=[32], WINDOW_MS=[0, 1], WORKERS=[1], FAST_QUEUE=[0, 1]),
            *_variants(BATCH=[1], WINDOW_MS=[0], WORKERS=[1, 2], FAST_QUEUE=[1]),
        ],
    ),
    Contestant(
        name="bentoml",
        title="BentoML",
        packages=["bentoml==1.4.39", "uvloop", "httptools"],
        command=["{bin}/bentoml", "serve", "tests.benchmarks.peers.bentoml:Embed", "--host", "127.0.0.1", "--port", "{port}"],
        path="/embed",
        ready="/readyz",
        body=_inputs,
        vectors=lambda answer: answer,
        variants=_variants(BATCH=[32, 1], WORKERS=[1, 2]),
    ),
    Contestant(
        name="mlserver",
        title="MLServer",
        packages=["mlserver==1.7.1", "uvloop<0.22"],  # with a newer one its workers die at once
        command=["-m", "tests.benchmarks.peers.mlserver"],
        path="/v2/models/digits/infer",
        ready="/v2/models/digits/ready",
        body=_columns,
        vectors=lambda answer: np.reshape(answer["outputs"][0]["data"], answer["outputs"][0]["shape"]),
        variants=[
            *_variants(BATCH=[32], WINDOW_MS=[0.01, 1], WORKERS=[0, 1]),
            *_variants(BATCH=[1], WINDOW_MS=[0], WORKERS=[0, 1]),
        ],
    ),
)
ALL = (OURS, *PEERS, PLAIN, NOOP)
BATCHING = ("litserve", "bentoml", "mlserver")
