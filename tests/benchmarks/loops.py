"""Measurements of the model without a server, on the server's core with one thread.

``python -m tests.benchmarks.loops NAME SECONDS [ARGUMENTS]`` prints the result of the function NAME as JSON. A separate process
has its own memory and core, which the load generator does not use.
"""

import base64
import io
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import orjson
from onnx import helper

from concord.model import bundle
from concord.model.modality import collate
from concord.model.runtime import Posterior, Runtime
from concord.service.inference.jobs import InferenceJob, RefinementLimits
from concord.service.inference.scheduler import NullObserver, Row, Scheduler
from tests.benchmarks.competitors.digits import DigitsEncoder
from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.process import SERVER_CORE
from tests.support.server import ROOT

WARMUP_SECONDS = 0.3
MIN_CALLS = 3


def encode_rates(seconds: float) -> dict[str, float]:
    """Return items per second of parsing and encoding: one photo or one word at a time, and requests of 32 photos or 32 words.

    A request of 32 items is parsed from its JSON body, and its embeddings are encoded in base64.
    """
    encoder = DigitsEncoder()

    def encode_next(items: Iterator[Mapping[str, str]]) -> None:
        encoder.encode([encoder.parse(next(items))])

    rates = {
        name: 1 / seconds_per_call(partial(encode_next, itertools.cycle(items)), seconds)
        for name, items in (("picture", photo_items()), ("word", word_items()))
    }
    bodies = {
        "bulk": orjson.dumps({"inputs": bulk_items()}),
        "bulk_word": orjson.dumps({"inputs": [word_items()[number % len(word_items())] for number in range(32)]}),
    }

    def encode_bulk(body: bytes) -> bytes:
        embeddings = encoder.encode([encoder.parse(item) for item in orjson.loads(body)["inputs"]])
        return orjson.dumps([base64.b64encode(embedding).decode() for embedding in embeddings])

    return {**rates, **{name: 32 / seconds_per_call(partial(encode_bulk, body), seconds) for name, body in bodies.items()}}


def refine_steps(seconds: float) -> dict[str, float]:
    """Return the seconds of one run of the refine graph, for 1 and 32 rows."""
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    return {
        str(rows): seconds_per_call(partial(runtime.refine, *_refine_arguments(runtime, rows)), seconds) for rows in (1, 32)
    }


def refinement_tick(seconds: float) -> dict[str, float]:
    """Return the seconds of one tick of the scheduler without the refine graph's own time, for 1 and 32 complete rows.

    The graph copies its posterior and adds up one number of each input, so that the inputs reach it.
    """
    return {str(rows): seconds_per_call(_scheduler_with_rows(rows).step, seconds) for rows in (1, 32)}


def _scheduler_with_rows(rows: int) -> Scheduler:
    """Return a scheduler with rows whose refinement costs nothing and never ends."""
    opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
    runtime = Runtime(_CheapRefinement(opened.path, opened.manifest, opened.sha256), threads=1)
    scheduler = Scheduler(runtime, max_batch=32, observer=NullObserver())
    row = {m.name: np.ones(m.shape, m.dtype) for m in runtime.modalities}
    limits = RefinementLimits(steps=sys.maxsize)
    scheduler.add([Row(InferenceJob(row, 0, index, limits), time.monotonic()) for index in range(rows)])
    return scheduler


class _CheapRefinement(bundle.Bundle):
    """The same bundle, with a refine graph of the same inputs and outputs that does next to nothing."""

    def content(self, name: str) -> bytes:
        content = super().content(name)
        if name != self.manifest.graphs.refine:
            return content
        graph = onnx.load_model_from_string(content).graph
        nodes = [helper.make_node("Identity", [part], [f"next_{part}"]) for part in ("mean", "log_var")]
        for value in graph.input:
            nodes += [
                helper.make_node("Flatten", [value.name], [f"{value.name}/flat"], axis=1),
                helper.make_node("Gather", [f"{value.name}/flat", "first"], [f"{value.name}/first"], axis=1),
                helper.make_node("Cast", [f"{value.name}/first"], [f"{value.name}/float"], to=onnx.TensorProto.FLOAT),
            ]
        nodes.append(helper.make_node("Sum", [f"{value.name}/float" for value in graph.input], ["objective"]))
        first = onnx.numpy_helper.from_array(np.array(0), "first")
        cheap = helper.make_graph(nodes, "cheap", list(graph.input), list(graph.output), [first])
        return helper.make_model(cheap, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def refine_with_torch(seconds: float) -> dict[str, float]:
    """Return the seconds to encode one complete row and refine it by four steps: PyTorch's eager autograd, and the graphs.

    Four steps take five evaluations of the objective: the last one only evaluates the final posterior.

    Raises:
        AssertionError: PyTorch and the graphs reach different posteriors.
    """
    import torch  # noqa: PLC0415 - slow to import, and only this function needs it
    from safetensors.torch import load_file  # noqa: PLC0415

    from concord.model.vae.gaussian import Gaussian, standard_like  # noqa: PLC0415
    from concord.model.vae.multimodal import MultimodalVAE  # noqa: PLC0415
    from concord.training import config_file  # noqa: PLC0415
    from concord.training.trainable import network_sizes  # noqa: PLC0415

    torch.set_num_threads(1)
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    manifest = runtime.bundle.manifest
    config = config_file.read(ROOT / "training/configs/digits.toml")
    options: dict[str, Any] = {"beta": manifest.beta, "fusion": config.network.fusion}
    if manifest.graphs.draw:
        options |= {"couplings": config.flow.couplings, "spread": config.flow.spread}
    vae = MultimodalVAE(manifest.modalities, network_sizes(config.network), **options)
    vae.load_state_dict(load_file(runtime.bundle.path / bundle.WEIGHTS))
    vae.eval().requires_grad_(False)
    inputs, present, _, anchor, noise = _refine_arguments(runtime, 1)
    arrays = {name: torch.from_numpy(array) for name, array in inputs.items()}
    present_tensor, noise_tensor = torch.from_numpy(present), torch.from_numpy(noise)

    def eager() -> Gaussian:
        with torch.no_grad():
            posterior: Gaussian = vae.aligned(arrays, present_tensor)
        prior = standard_like(posterior)
        for _ in range(5):
            mean, log_var = (parameter.detach().requires_grad_() for parameter in posterior)
            objective = vae.objective(arrays, present_tensor, Gaussian(mean, log_var), prior, noise_tensor)
            gradient = Gaussian(*torch.autograd.grad(objective.sum(), (mean, log_var)))
            with torch.no_grad():
                evaluated, posterior = posterior, vae.refiner(Gaussian(mean, log_var), gradient)
        return evaluated

    def graphs() -> Posterior:
        posterior = runtime.encode(inputs, present)
        for _ in range(5):
            evaluated = posterior
            posterior, _ = runtime.refine(inputs, present, posterior, anchor, noise)
        return evaluated

    difference = float(np.abs(eager().mean.numpy() - graphs().mean).max())
    assert difference < 1e-3, f"the posterior means of PyTorch and the graphs differ by {difference}"
    return {"eager": seconds_per_call(eager, seconds, np.mean), "graphs": seconds_per_call(graphs, seconds, np.mean)}


def scaling_point(seconds: float, folder: str, rows: str, *steps: str) -> dict[str, Any]:
    """Return rows per second that are encoded and refined, and the largest resident memory in MB.

    Args:
        seconds: for each number of steps.
        folder: of the bundle.
        rows: number of rows in the batch.
        steps: numbers of refinement steps. Each has a rate in the result.
    """
    runtime = Runtime.load(Path(folder), threads=1)
    with np.load(io.BytesIO(runtime.bundle.content(bundle.GOLDEN)), allow_pickle=False) as golden:
        indices = np.arange(int(rows)) % len(golden["present"])
        inputs = {m.name: golden[f"input.{m.name}"][indices] for m in runtime.modalities}
    present = np.ones((int(rows), len(runtime.modalities)), dtype=bool)
    noise = np.random.default_rng(0).standard_normal((int(rows), runtime.noise_samples, runtime.latent), dtype=np.float32)
    zeros = np.zeros((int(rows), runtime.latent), np.float32)
    prior = Posterior(zeros, zeros)

    def encode_and_refine(step_count: int) -> None:
        posterior = runtime.encode(inputs, present)
        for _ in range(step_count + 1 if step_count else 0):
            posterior, _ = runtime.refine(inputs, present, posterior, prior, noise)

    rates = [int(rows) / seconds_per_call(partial(encode_and_refine, int(count)), seconds) for count in steps]
    return {"rows_per_s": rates, "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def memory(_: float) -> dict[str, float]:
    """Return the resident memory in MB that each part of the start of a service adds."""
    added: dict[str, float] = {}
    before = 0.0

    def measure(name: str) -> None:
        nonlocal before
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now = pages * resource.getpagesize() / 2**20
        added[name], before = round(now - before, 1), now

    measure("Python, NumPy, ONNX Runtime, onnx")
    from concord.service.cli import bound_heap, create_app, freeze_heap  # noqa: PLC0415
    from concord.service.settings import Settings  # noqa: PLC0415

    measure("web server and service")
    bound_heap()
    app = create_app(Settings(threads=1))
    freeze_heap()
    measure("bundle")
    (model,) = app.state.registry.models
    for rows in model.runtime.batch_sizes:
        model.runtime.warm_up(rows)
    measure("largest batch")
    return added


def operators(seconds: float) -> dict[str, dict[str, float]]:
    """Return the share of the largest operators in the time of the kernels: a refinement step of one complete row, and the
    encoder for one and 32 photos."""
    folder = tempfile.mkdtemp()

    class Profiled(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, f"{folder}/profile"

    onnxruntime.SessionOptions = Profiled
    encoder = DigitsEncoder()
    photos = [encoder.parse(photo_items()[number % 16]) for number in range(32)]

    def kernels(run: Callable[[Runtime], Callable[[], Any]], file: str) -> dict[str, float]:
        runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
        seconds_per_call(run(runtime), seconds)
        counts: Counter[str] = Counter()
        for event in json.loads(Path(runtime._sessions[file].end_profiling()).read_text()):
            name = event.get("args", {}).get("op_name")
            if name != "If" and event["name"].endswith("_kernel_time"):  # what runs in a branch is counted there
                counts[name] += event["dur"]
        total = sum(counts.values())
        return {name: round(count / total, 3) for name, count in counts.most_common(6)}

    def encode(rows: int) -> dict[str, float]:
        arguments = collate(encoder.modalities, photos[:rows])
        return kernels(lambda runtime: partial(runtime.encode, *arguments), "encode.onnx")

    step = kernels(lambda runtime: runtime.blank_step(1), "refine.onnx")
    return {"refinement step, 1 row": step, "encoder, 1 photo": encode(1), "encoder, 32 photos": encode(32)}


def bulk_items() -> list[dict[str, str]]:
    """Return 32 photos."""
    return [dict(photo_items()[number % len(photo_items())]) for number in range(32)]


def seconds_per_call(call: Callable[[], Any], seconds: float, average: Callable[[list[float]], Any] = np.median) -> float:
    """Return the average duration of a call in seconds, after WARMUP_SECONDS, from at least MIN_CALLS calls."""
    durations: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < WARMUP_SECONDS + seconds or len(durations) < MIN_CALLS:
        call()
        if now - began > WARMUP_SECONDS:
            durations.append(time.perf_counter() - now)
    return float(average(durations))


def _refine_arguments(runtime: Runtime, rows: int) -> tuple[dict[str, Any], Any, Posterior, Posterior, Any]:
    """Return arguments of ``Runtime.refine``: complete rows, their aligned posteriors, the prior as anchor, and noise."""
    encoder = DigitsEncoder()
    generator = np.random.default_rng(0)
    row = {**encoder.parse({**photo_items()[0], "word": "seven"}), "digit": generator.random((1, 28, 28), dtype=np.float32)}
    inputs, present = collate(runtime.modalities, [row] * rows)
    start = runtime.encode(inputs, present)
    prior = Posterior(np.zeros_like(start.mean), np.zeros_like(start.mean))
    noise = generator.standard_normal((rows, runtime.noise_samples, runtime.latent), dtype=np.float32)
    return inputs, present, start, prior, noise


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (encode_rates, refine_steps, refinement_tick, refine_with_torch, scaling_point, memory, operators)
}

if __name__ == "__main__":
    os.sched_setaffinity(0, {SERVER_CORE})
    print(json.dumps(FUNCTIONS[sys.argv[1]](float(sys.argv[2]), *sys.argv[3:])))
