"""The servers of the comparison: how each is started, the variants of its settings, its requests and its responses."""

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
from tests.benchmarks.process import SERVER_CORE, Process, free_ports, running
from tests.support.traffic import post

Item = Mapping[str, str]
Embeddings = NDArray[np.float64]


@dataclass(frozen=True)
class Server:
    """A server of embeddings.

    Args:
        name: key in the results file.
        title: heading of its column.
        command: arguments of the interpreter. ``{port}`` and ``{bin}`` (the folder of the interpreter) are replaced; a first
            argument that is an absolute path is run instead of the interpreter.
        path: of the route that embeds.
        ready_path: of the route that returns status 200 when the server is ready.
        build_body: returns the request body for items.
        extract_embeddings: returns the embeddings (items, latent) in a response body.
        packages: requirements of its virtual environment. Empty: it runs in the environment of this process.
        variants: settings to choose from, as environment variables.
    """

    name: str
    title: str
    command: Sequence[str]
    path: str
    ready_path: str
    build_body: Callable[[Sequence[Item]], dict[str, Any]]
    extract_embeddings: Callable[[Any], Any]
    packages: Sequence[str] = ()
    variants: Sequence[Mapping[str, str]] = field(default=({},))

    def requests(self, items: Sequence[Item]) -> list[bytes]:
        """Return one HTTP request for each item."""
        return [post(self.path, self.build_body([item])) for item in items]

    def parse_embeddings(self, body: bytes) -> Embeddings:
        """Return the embeddings (items, latent) of a response."""
        return np.array(self.extract_embeddings(json.loads(body)), dtype=np.float64)

    def interpreter(self) -> Path:
        """Return the Python of the server's environment. Builds the environment if necessary."""
        return environments.interpreter(self.name, self.packages) if self.packages else Path(sys.executable)

    def running(self, variant: Mapping[str, str], cores: Sequence[int] = (SERVER_CORE,)) -> AbstractContextManager[Process]:
        """Return a context in which the server runs with these settings on these cores and is ready."""
        port, *more = free_ports(3)
        python = self.interpreter()
        ports = {"PORT": str(port), "PORT_2": str(more[0]), "PORT_3": str(more[1])}
        arguments = [argument.format(port=port, bin=python.parent) for argument in self.command]
        command = arguments if arguments[0].startswith("/") else [str(python), *arguments]
        path = {"PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin"}
        return running(command, {**path, **ports, **variant}, port, self.ready_path, cores)


def _variants(**choices: Sequence[object]) -> list[dict[str, str]]:
    """Return every combination of the values."""
    variants: list[dict[str, str]] = [{}]
    for name, values in choices.items():
        variants = [{**variant, name: str(value)} for variant in variants for value in values]
    return variants


def _inputs_body(items: Sequence[Item]) -> dict[str, Any]:
    return {"inputs": [dict(item) for item in items]}


def _v2_body(items: Sequence[Item]) -> dict[str, Any]:
    """Return the body in the V2 inference protocol: one tensor for each modality."""
    return {
        "inputs": [
            {"name": name, "datatype": "BYTES", "shape": [len(items), 1], "data": [item[name] for item in items]}
            for name in items[0]
        ]
    }


def _plain_fastapi(title: str, name: str, variants: Sequence[Mapping[str, str]]) -> Server:
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "error", "--port", "{port}"]
    return Server(
        name=name,
        title=title,
        command=["-m", "uvicorn", "tests.benchmarks.competitors.plain:app", *options],
        path="/embed",
        ready_path="/ready",
        build_body=_inputs_body,
        extract_embeddings=lambda response: response["embeddings"],
        variants=variants,
    )


CONCORD = Server(
    name="concord",
    title="Concord",
    command=["-m", "concord.service", "serve", "--port", "{port}"],
    path="/embed",
    ready_path="/readyz",
    build_body=_inputs_body,
    extract_embeddings=lambda response: [result["embedding"] for result in response["data"]],
)
PLAIN = _plain_fastapi("FastAPI, no batching", "fastapi", [{"HANDLER": "thread"}, {"HANDLER": "async"}])
NOOP = _plain_fastapi("no-op route", "noop", [{"HANDLER": "noop"}])
COMPETITORS = (
    Server(
        name="litserve",
        title="LitServe",
        packages=["litserve==0.2.19"],
        command=["-m", "tests.benchmarks.competitors.litserve"],
        path="/predict",
        ready_path="/health",
        build_body=lambda items: dict(items[0]),
        extract_embeddings=lambda response: [response["embedding"]],
        variants=[
            *_variants(BATCH=[32], WINDOW_MS=[0, 1], WORKERS=[1], FAST_QUEUE=[0, 1]),
            *_variants(BATCH=[1], WINDOW_MS=[0], WORKERS=[1, 2], FAST_QUEUE=[1]),
        ],
    ),
    Server(
        name="bentoml",
        title="BentoML",
        packages=["bentoml==1.4.39", "uvloop", "httptools"],
        command=[
            "{bin}/bentoml",
            "serve",
            "tests.benchmarks.competitors.bentoml:Embed",
            "--host",
            "127.0.0.1",
            "--port",
            "{port}",
        ],
        path="/embed",
        ready_path="/readyz",
        build_body=_inputs_body,
        extract_embeddings=lambda response: response,
        variants=_variants(BATCH=[32, 1], WORKERS=[1, 2]),
    ),
    Server(
        name="mlserver",
        title="MLServer",
        packages=["mlserver==1.7.1", "uvloop<0.22"],  # its workers exit at once with newer versions of uvloop
        command=["-m", "tests.benchmarks.competitors.mlserver"],
        path="/v2/models/digits/infer",
        ready_path="/v2/models/digits/ready",
        build_body=_v2_body,
        extract_embeddings=lambda response: np.reshape(response["outputs"][0]["data"], response["outputs"][0]["shape"]),
        variants=[
            *_variants(BATCH=[32], WINDOW_MS=[0.01, 1], WORKERS=[0, 1]),
            *_variants(BATCH=[1], WINDOW_MS=[0], WORKERS=[0, 1]),
        ],
    ),
)
"""Inference servers that can batch."""
SERVERS = (CONCORD, *COMPETITORS, PLAIN, NOOP)
