"""``concord doctor``: checks of this machine, its device and the bundle, before anything is served."""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from concord.model import bundle
from concord.model.bundle import BundleError
from concord.model.installation import install_command
from concord.model.runtime import VERSION, Runtime
from concord.model.runtime.device import COMPUTE_CAPABILITIES, MIN_DRIVER, cuda_is_installed
from concord.service.settings import Settings

ROWS = (1, 8, 32)
"""Batch sizes of the timed refinement steps."""
RUNS = 20
GPU_QUERY = "name,driver_version,compute_cap,memory.total,memory.used,mig.mode.current"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        check: its name.
        ok: whether the service can run so.
        found: what there is, with units.
        remedy: what to do if it is not ok, unless ``found`` says so.
    """

    check: str
    ok: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.ok else 'FAIL'}  {self.check:<12} {self.found}"
        return line if self.ok or not self.remedy else f"{line}. {self.remedy}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield the findings, each as soon as it is known. They end where no later check is possible.

    Checks: ONNX Runtime, the driver and the GPUs, cores and threads, and for each bundle: whether it is intact, its device,
    the provider of every node, the difference from its golden examples, the time of a refinement step, and memory.
    """
    wants_gpu = settings.device.startswith("cuda")
    yield _onnx_runtime(wants_gpu)
    if wants_gpu or (settings.device == "auto" and cuda_is_installed()):
        yield from _gpus(required=wants_gpu)
    yield Finding("cores", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process")
    try:
        folders = settings.bundle_folders()
    except BundleError as error:
        yield Finding("bundle", False, str(error), "Set CONCORD_BUNDLE or CONCORD_BUNDLES")
        return
    for folder in folders:
        yield from _bundle(folder, settings)


def report(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as JSON: ``ok``, and the fields of each."""
    listed = [asdict(finding) | ({"remedy": ""} if finding.ok else {}) for finding in findings]
    return {"ok": all(finding.ok for finding in findings), "findings": listed}


def _onnx_runtime(wants_gpu: bool) -> Finding:
    build = "CUDA" if cuda_is_installed() else "CPU"
    return Finding(
        "onnxruntime",
        build == "CUDA" or not wants_gpu,
        f"{VERSION}, build for {build}",
        f"CONCORD_DEVICE needs the build for CUDA, in an environment without [cpu]: {install_command('gpu')}",
    )


def _gpus(*, required: bool) -> Iterator[Finding]:
    """What NVIDIA's driver says. It is on the host; the container toolkit lends it to a container."""
    remedy = f"Install NVIDIA's driver {MIN_DRIVER} or newer, and start the container with --gpus (NVIDIA Container Toolkit)"
    if shutil.which("nvidia-smi") is None:
        yield Finding("driver", not required, "nvidia-smi is not here", remedy)
        return
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        yield Finding("driver", not required, (output.stdout + output.stderr).strip().replace("\n", " "), remedy)
        return
    for index, line in enumerate(output.stdout.strip().splitlines()):
        name, driver, capability, total, used, mig = (field.strip() for field in line.split(","))
        yield Finding("driver", int(driver.partition(".")[0]) >= MIN_DRIVER, driver, remedy)
        yield Finding(
            f"gpu {index}",
            capability in COMPUTE_CAPABILITIES,
            f"{name}, compute capability {capability}, {used} of {total} MiB used, MIG {mig}",
            f"ONNX Runtime has kernels for {', '.join(COMPUTE_CAPABILITIES)} only: use another GPU, or CONCORD_DEVICE=cpu",
        )


def _bundle(folder: Path, settings: Settings) -> Iterator[Finding]:
    try:
        opened = bundle.read(folder)
    except BundleError as error:
        yield Finding("bundle", False, str(error), "Copy the bundle again")
        return
    manifest = opened.manifest
    yield Finding("bundle", True, f"{manifest.name}@{manifest.version}, {folder}")
    before = _threads()
    try:
        runtime = Runtime(opened, **settings.runtime_options())
    except BundleError as error:
        yield Finding("device", False, str(error))
        return
    fell_back = runtime.device.is_cpu and settings.device == "auto" and cuda_is_installed()
    yield Finding(
        "device",
        not fell_back,
        str(runtime.device),
        "CUDA is installed and did not start: the log says why. CONCORD_DEVICE=cuda makes that an error, cpu accepts it",
    )
    yield Finding("threads", True, f"{_threads() - before} more for {manifest.name}")
    for file, nodes in runtime.nodes_by_provider().items():
        yield Finding("graph", True, f"{file}: " + ", ".join(f"{count} nodes {name}" for name, count in sorted(nodes.items())))
    if runtime.device.graphs:
        captured, others = sorted(runtime.captured_graphs), sorted(runtime.fixed_graphs.keys() - runtime.captured_graphs)
        found = f"recorded: {', '.join(captured) or 'none'}"
        yield Finding("cuda graphs", True, found + (f"; slower without: {', '.join(others)}" if others else ""))
    try:
        difference = runtime.replay_golden()
        yield Finding("golden", True, f"largest difference {difference:.1e}, allowed {runtime.device.tolerance:g}")
    except Exception as error:  # graphs raise errors of any class
        remedy = (
            "This device computes other results than the exporter, or fails: try CONCORD_TF32=false, then CONCORD_DEVICE=cpu"
        )
        yield Finding("golden", False, str(error), remedy)
        return
    for rows in ROWS:
        yield Finding("refine step", True, f"{rows} rows: {_step_milliseconds(runtime, rows):.2f} ms (median of {RUNS})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    yield Finding("memory", True, f"{peak} MiB at most, of this process")


def _step_milliseconds(runtime: Runtime, rows: int) -> float:
    """Return the median time of a refinement step of complete rows."""
    step = runtime.blank_step(rows)
    step()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


def _threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())
