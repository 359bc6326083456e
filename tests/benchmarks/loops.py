"""The model without a server, on the server's core and one thread: ``python -m tests.benchmarks.loops raw SECONDS``, steps,
torch, scale. JSON."""

import base64
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from model import bundle
from model.modality import collate
from model.runtime import Posterior, Runtime
from tests.benchmarks.peers.digits import Digits
from tests.benchmarks.process import SERVER_CORE
from tests.benchmarks.samples import pictures, words
from tests.server import ROOT

WARM_SECONDS = 0.3
FEWEST = 3
"""Runs, however long each takes."""


def raw(seconds: float) -> dict[str, float]:
    """Items a second: decode and encode one by one, and 32 at a time from a JSON body to base64 vectors."""
    digits = Digits()
    told = {}
    for name, items in (("picture", pictures()), ("word", words())):
        turn = iter(range(1 << 40))
        told[name] = 1 / timed(lambda: digits.encode([digits.decode(items[next(turn) % len(items)])]), seconds)  # noqa: B023
    body = orjson.dumps({"inputs": bulk_items()})

    def bulk() -> bytes:
        vectors = digits.encode([digits.decode(item) for item in orjson.loads(body)["inputs"]])
        return orjson.dumps([base64.b64encode(vector).decode() for vector in vectors])

    return {**told, "bulk": 32 / timed(bulk, seconds)}


def steps(seconds: float) -> dict[str, float]:
    """Seconds of one bare call of the refine graph with these rows."""
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    return {str(rows): timed(partial(runtime.refine, *_start(runtime, rows)), seconds) for rows in (1, 32)}


def torch(seconds: float) -> dict[str, float]:
    """Seconds of encoding one complete row and refining it by four steps: PyTorch's autograd, and the graphs in a plain loop.

    Four steps take five evaluations of the objective, of which the last one only judges.
    """
    import torch as pytorch  # noqa: PLC0415 - the others shall not wait for it
    from safetensors.torch import load_file  # noqa: PLC0415

    from model.vae.gaussian import Gaussian, standard_like  # noqa: PLC0415
    from model.vae.multimodal import MultimodalVAE  # noqa: PLC0415
    from training import config_file  # noqa: PLC0415

    pytorch.set_num_threads(1)
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    manifest = runtime.bundle.manifest
    network = config_file.read(ROOT / "training/configs/digits.toml").network
    vae = MultimodalVAE(manifest.modalities, **network.model_dump(), beta=manifest.beta)
    vae.load_state_dict(load_file(runtime.bundle.path / bundle.WEIGHTS))
    vae.eval().requires_grad_(False)
    inputs, present, _, anchor, noise = _start(runtime, 1)
    arrays = {name: pytorch.from_numpy(array) for name, array in inputs.items()}
    there, drawn = pytorch.from_numpy(present), pytorch.from_numpy(noise)

    def eager() -> Gaussian:
        with pytorch.no_grad():
            posterior = vae.aligned(arrays, there)
        prior = standard_like(posterior)
        for _ in range(5):
            mean, log_var = (one.detach().requires_grad_() for one in posterior)
            objective = vae.objective(arrays, there, Gaussian(mean, log_var), prior, drawn)
            gradient = Gaussian(*pytorch.autograd.grad(objective.sum(), (mean, log_var)))
            with pytorch.no_grad():
                reached, posterior = posterior, vae.refiner(Gaussian(mean, log_var), gradient)
        return reached

    def graphs() -> Posterior:
        posterior = runtime.encode(inputs, present)
        for _ in range(5):
            reached = posterior
            posterior, _ = runtime.refine(inputs, present, posterior, anchor, noise)
        return reached

    difference = float(np.abs(eager().mean.numpy() - graphs().mean).max())
    assert difference < 1e-3, f"PyTorch and the graphs differ by {difference}"
    return {"eager": timed(eager, seconds, np.mean), "graphs": timed(graphs, seconds, np.mean)}


def scale(seconds: float, folder: str, rows: str, *steps: str) -> dict[str, Any]:
    """Rows a second that are encoded and refined by each of these numbers of steps, and the largest resident memory."""
    runtime = Runtime.load(Path(folder), threads=1)
    with np.load(io.BytesIO(runtime.bundle.content(bundle.GOLDEN)), allow_pickle=False) as golden:
        places = np.arange(int(rows)) % len(golden["present"])
        inputs = {m.name: golden[f"input.{m.name}"][places] for m in runtime.modalities}
    present = np.ones((int(rows), len(runtime.modalities)), dtype=bool)
    noise = np.random.default_rng(0).standard_normal((int(rows), runtime.samples, runtime.latent), dtype=np.float32)
    prior = np.zeros((int(rows), runtime.latent), np.float32)

    def run(count: int) -> None:
        posterior = runtime.encode(inputs, present)
        for _ in range(count + 1 if count else 0):
            posterior, _ = runtime.refine(inputs, present, posterior, Posterior(prior, prior), noise)

    rates = [int(rows) / timed(lambda: run(int(count)), seconds) for count in steps]  # noqa: B023
    return {"rows_per_s": rates, "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def bulk_items() -> list[dict[str, str]]:
    """32 photographs."""
    return [dict(pictures()[number % len(pictures())]) for number in range(32)]


def timed(run: Callable[[], Any], seconds: float, average: Callable[[list[float]], Any] = np.median) -> float:
    """Seconds of one run."""
    times: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < WARM_SECONDS + seconds or len(times) < FEWEST:
        run()
        if now - began > WARM_SECONDS:
            times.append(time.perf_counter() - now)
    return float(average(times))


def _start(runtime: Runtime, rows: int) -> tuple[dict[str, Any], Any, Posterior, Posterior, Any]:
    """Arguments of ``refine``: complete rows, posteriors where the encoder puts them, the prior as anchor."""
    digits = Digits()
    generator = np.random.default_rng(0)
    row = {**digits.decode({**pictures()[0], "word": "seven"}), "digit": generator.random((1, 28, 28), dtype=np.float32)}
    inputs, present = collate(runtime.modalities, [row] * rows)
    start = runtime.encode(inputs, present)
    anchor = Posterior(np.zeros_like(start.mean), np.zeros_like(start.mean))
    return inputs, present, start, anchor, generator.standard_normal((rows, runtime.samples, runtime.latent), dtype=np.float32)


if __name__ == "__main__":
    os.sched_setaffinity(0, {SERVER_CORE})
    told: Callable[..., Any] = {"raw": raw, "steps": steps, "torch": torch, "scale": scale}[sys.argv[1]]
    print(json.dumps(told(float(sys.argv[2]), *sys.argv[3:])))
