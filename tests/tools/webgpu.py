"""``python -m tests.tools.webgpu``: run the graphs of a bundle on a device with its own memory that needs no GPU.

The device is ONNX Runtime's WebGPU provider on the software Vulkan of Debian's Chromium. Its package replaces ``onnxruntime``,
so it is installed into a folder that comes first on the path::

    apt-get install chromium
    pip install --no-deps --target /tmp/webgpu onnxruntime-webgpu==1.27.0
    PYTHONPATH=/tmp/webgpu:. python -m tests.tools.webgpu digits

Each graph runs in its own process, because the provider may end it. Its line names the largest difference from
the CPU, for each step of the refine graph.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from concord.model import bundle
from concord.model.runtime.refinement_table import POSTERIOR, SLOTS, table, with_tables

CHROMIUM = Path("/usr/lib/chromium")
PROVIDER = "WebGpuExecutionProvider"
SECONDS = 300
ROWS, STEPS = 4, 3


def main(name: str, file: str | None = None) -> None:
    """Compare one graph of a built-in bundle, or all of them, each in its own process."""
    opened = bundle.read(bundle.builtin(name))
    if file is not None:
        compare(opened, file)
        return
    if PROVIDER not in onnxruntime.get_available_providers():
        raise SystemExit(f"this ONNX Runtime has no {PROVIDER}: see the head of {__file__}")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(CHROMIUM),
        "VK_ICD_FILENAMES": str(CHROMIUM / "vk_swiftshader_icd.json"),
    }
    for graph in opened.manifest.graphs.names:
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.tools.webgpu", name, graph]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        result = run.stdout.strip().replace("\n", "; ") or run.stderr.strip().rpartition("\n")[2]
        ended = f" ended by signal {-run.returncode}" if run.returncode < 0 else ""
        print(f"{graph}: {result}{ended} ({time.monotonic() - began:.0f} s)", flush=True)


def compare(opened: bundle.Bundle, file: str) -> None:
    """Print the largest difference of a graph's outputs from those of the CPU, for each step on tables of the refine graph."""
    is_refine = file == opened.manifest.graphs.refine
    content = with_tables(opened.content(file)) if is_refine else opened.content(file)
    cpu, device = (_open(opened, content, providers) for providers in (["CPUExecutionProvider"], [PROVIDER]))
    feed = {value.name: _values(value) for value in cpu.get_inputs()}
    for name in {"present", table("present")} & feed.keys():
        feed[name] = np.ones_like(feed[name])
    if SLOTS in feed:
        feed[SLOTS] = np.array([2, 0])
    for _ in range(STEPS if is_refine else 1):
        outputs = [session.run(None, feed) for session in (cpu, device)]
        difference = max(float(np.abs(a - b).max()) for a, b in zip(*outputs, strict=True))
        print(f"difference {difference:.1e}", flush=True)
        if is_refine:
            feed[POSTERIOR] = outputs[0][1]


def _open(opened: bundle.Bundle, content: bytes, providers: list[str]) -> onnxruntime.InferenceSession:
    weights, options = opened.content(bundle.WEIGHTS), onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
    return onnxruntime.InferenceSession(content, options, providers=providers)


def _values(value: Any) -> np.ndarray:
    shape = [ROWS if isinstance(axis, str) else axis for axis in value.shape]
    numbers = np.random.default_rng(0).random(shape, dtype=np.float32)
    return numbers if value.type == "tensor(float)" else numbers.astype(np.int64 if "int64" in value.type else bool)


if __name__ == "__main__":
    main(*sys.argv[1:])
