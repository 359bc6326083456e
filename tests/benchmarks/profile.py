"""``python -m tests.benchmarks.profile [LOAD ...]``: where the processor time of the service goes, for each load.

py-spy samples the running threads of the service, on its core, while the load generator sends requests from the other one. Each
sample counts for the innermost function that a part of PARTS names. The results of these loads replace those in
``results/profile.json``; ``python -m tests.benchmarks.report`` writes the tables.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.overhead import complete_request, photo_request, run_loop, send_mixed
from tests.benchmarks.process import GENERATOR_CORE, Process
from tests.benchmarks.rounds import sequential
from tests.benchmarks.servers import CONCORD
from tests.support.traffic import Connections, closed_loop, open_loop

FILE = Path(__file__).parent / "results/profile.json"
PARTS = (
    ("ONNX Runtime", r"onnxruntime/"),
    ("pictures, base64, texts", r"model/codec/|PIL/"),
    ("batches", r"collate \(|_take_slots|_release"),
    ("queue and scheduler", r"service/inference/|model/runtime/"),
    ("JSON, options, items", r"service/api/(body|requests|parse_pool)\.py"),
    ("response", r"service/api/responses\.py|respond \("),
    (
        "middleware and metrics",
        r"service/(telemetry|request_state|http/(auth|body_limit|fast_path|admission))|prometheus_client/|structlog/",
    ),
    ("HTTP protocol", r"uvicorn/|starlette/|fastapi/|service/http/"),
    ("routes", r"service/api/"),
    ("event loop and sockets", r"asyncio/"),
)
"""Name of each part, and a pattern of its functions as py-spy writes them: function (file:line)."""
WAITING = ("change of threads", re.compile(r"^(wait|acquire|notify) |^Condition\."))
"""What a thread does while it waits for another one, or for the interpreter's lock."""
RATE = 250
"""Samples per second."""
SECONDS = 6.0

Load = Callable[[Connections, float], Awaitable[object]]
"""Sends requests for so many seconds."""


def _closed(items: Iterable[Mapping[str, str]], clients: int) -> Load:
    requests = CONCORD.requests(list(items))
    return lambda connections, seconds: closed_loop(connections, requests, clients, seconds)


def _mixed(connections: Connections, seconds: float) -> Awaitable[object]:
    refined = [photo_request(number, 20) for number in range(16)]
    return send_mixed(connections, CONCORD.requests(photo_items()), refined, 0.1, seconds)


LOADS: dict[str, Load] = {
    "photo, 1 connection": lambda connections, seconds: sequential(connections, CONCORD.requests(photo_items()), seconds),
    "photo, 16 connections": _closed(photo_items(), 16),
    "photo, 64 connections": _closed(photo_items(), 64),
    "word, 64 connections": _closed(word_items(), 64),
    "photo, 1,000 requests/s": lambda connections, seconds: open_loop(
        connections, CONCORD.requests(photo_items()), 1000, seconds
    ),
    "one in ten refined by 20 steps": _mixed,
    "complete row, 4 steps": lambda connections, seconds: sequential(connections, [complete_request(1, 4)], seconds),
}


def main(loads: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(LOADS)}. Default: all.")] = None) -> None:
    """Profile the service under these loads, and the memory and the graphs of a process."""
    unknown = set(loads or ()) - LOADS.keys()
    if unknown:
        raise typer.BadParameter(f"received {', '.join(sorted(unknown))}; the loads are {', '.join(LOADS)}")
    content = json.loads(FILE.read_text()) if FILE.is_file() else {"loads": {}}
    for name in loads or LOADS:
        content["load_average"] = round(os.getloadavg()[0], 1)
        with CONCORD.running({}) as process:
            content["loads"][name] = profile(process, LOADS[name])
        print(name, content["loads"][name], file=sys.stderr, flush=True)
    if not loads:
        content["memory_mb"] = run_loop("memory", 0)
        content["operators"] = run_loop("operators", 1.0)
    content["loads"] = {name: content["loads"][name] for name in LOADS if name in content["loads"]}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


def profile(process: Process, load: Load, seconds: float = SECONDS) -> dict[str, float]:
    """Return the share of each part in the samples of the service under a load.

    Raises:
        subprocess.CalledProcessError: py-spy cannot read the memory of the service. It needs the rights of its user, and the
            capability SYS_PTRACE in a container.
    """

    async def run(stacks: Path) -> None:
        async with Connections(process.port) as connections:
            await load(connections, 0.5)
            program = Path(sys.executable).parent / "py-spy"
            command = ["taskset", "--cpu-list", str(GENERATOR_CORE), str(program), "record", "--nonblocking", "--format", "raw"]
            options = ["--rate", str(RATE), "--duration", str(round(seconds)), "--output", str(stacks)]
            spy = await asyncio.create_subprocess_exec(
                *command, *options, "--pid", str(process.main_process_id()), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            _, (out, error) = await asyncio.gather(load(connections, seconds + 1), spy.communicate())
            if spy.returncode:
                raise subprocess.CalledProcessError(spy.returncode or 0, command, out, error)

    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks"
        uvloop.run(run(stacks))
        return shares(stacks.read_text().splitlines())


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Return the share of each part, in the order of PARTS.

    Args:
        lines: "outermost;...;innermost COUNT", as py-spy writes stacks.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        counts[part_of(stack.split(";"))] += int(count)
    total = sum(counts.values())
    names = [name for name, _ in PARTS] + [WAITING[0], "other"]
    return {name: round(counts[name] / total, 3) for name in names if counts[name]}


def part_of(stack: list[str]) -> str:
    """Return the part of the innermost function that one names."""
    if WAITING[1].search(stack[-1]) and "threading.py" in stack[-1]:
        return WAITING[0]
    for function in reversed(stack):
        for name, pattern in PARTS:
            if re.search(pattern, function):
                return name
    return "other"


if __name__ == "__main__":
    typer.run(main)
