"""ONNX Runtime's CUDA provider, with the built-in bundle: needs a GPU and the gpu extra, and is skipped without.

The loss of the GPU is real: PyTorch stores out of bounds in the process of the runtime, which shares its CUDA context.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord.model import bundle
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.device import classify, cuda_is_installed, gpu_is_visible
from tests.benchmarks.process import free_ports
from tests.support.server import ROOT, running

pytestmark = pytest.mark.skipif(not (cuda_is_installed() and gpu_is_visible()), reason="needs a GPU and the gpu extra")
LOSE = """
import torch
torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
"""
LOSE_DEVICE = """
import pathlib
from concord.model.runtime import Runtime

encode, order = Runtime.encode, pathlib.Path({file!r})


def encode_on_lost_device(self, *arguments):
    if order.exists():
        order.unlink()
        exec({code!r})
    return encode(self, *arguments)


Runtime.encode = encode_on_lost_device
"""
RESTART_ONCE = '"$@"; status=$?; echo $status > {file}; [ $status -eq 70 ] && exec "$@"'


@pytest.fixture(scope="module")
def cpu() -> Runtime:
    return Runtime.load(bundle.builtin("digits"), threads=4)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "cuda-graphs"])
def cuda(request: pytest.FixtureRequest) -> Runtime:
    return Runtime.load(bundle.builtin("digits"), device="cuda", cuda_graphs=request.param)


def random_rows(runtime: Runtime, rows: int, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of ``Runtime.refine``, with random modalities present."""
    random = np.random.default_rng(seed)
    inputs = {
        m.name: random.random((rows, *m.shape)).astype(m.dtype)
        if m.dtype == np.float32
        else random.integers(0, 20, (rows, *m.shape)).astype(m.dtype)
        for m in runtime.modalities
    }
    present = random.random((rows, len(runtime.modalities))) < 0.6
    present[~present.any(axis=1), 0] = True
    parameters = [random.standard_normal((rows, runtime.latent)).astype(np.float32) for _ in range(4)]
    return {
        "inputs": inputs,
        "present": present,
        "posterior": Posterior(parameters[0], parameters[1] - 2),
        "anchor": Posterior(parameters[2], parameters[3] - 2),
        "noise": random.standard_normal((rows, runtime.noise_samples, runtime.latent)).astype(np.float32),
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def test_graphs_run_on_the_gpu_and_repeat_the_golden_examples(cuda: Runtime) -> None:
    assert not cuda.device.is_cpu
    assert all("CUDAExecutionProvider" in nodes for nodes in cuda.nodes_by_provider().values())
    assert cuda.replay_golden() < 1e-4


def test_every_graph_is_captured_when_cuda_graphs_are_on(cuda: Runtime) -> None:
    assert not cuda.device.graphs or cuda.captured_graphs == cuda.fixed_graphs.keys()


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64, 65])
def test_results_equal_those_of_the_cpu_at_every_batch_size(cuda: Runtime, cpu: Runtime, rows: int) -> None:
    for seed in (0, 1):  # the second run replays what the first has captured
        arguments = random_rows(cpu, rows, seed)
        actual, expected = (r.encode(arguments["inputs"], arguments["present"]) for r in (cuda, cpu))
        assert_close(actual.parameters, expected.parameters, 1e-4)
        (moved, objective), (expected_moved, expected_objective) = (r.refine(**arguments) for r in (cuda, cpu))
        assert_close(moved.parameters, expected_moved.parameters, 1e-3)
        np.testing.assert_allclose(objective, expected_objective, rtol=1e-4)
        z = cpu.sample(expected, arguments["noise"][:, 0])
        assert_close(cuda.sample(expected, arguments["noise"][:, 0]), z, 1e-4)
        for modality in cpu.modalities:
            assert_close(cuda.decode(modality.name, z), cpu.decode(modality.name, z), 1e-3)


def test_refinement_table_on_the_gpu_equals_that_of_the_cpu(cuda: Runtime, cpu: Runtime) -> None:
    arguments = random_rows(cpu, 20)
    held = {}
    for runtime in (cuda, cpu):
        rows = runtime.table_rows(
            arguments["inputs"],
            arguments["present"],
            arguments["posterior"].parameters,
            arguments["anchor"].parameters,
            arguments["noise"],
        )
        table = runtime.refinement_table(24)
        held[runtime] = (table, table.take(rows))
    for step in range(6):
        chosen = np.random.default_rng(step).permutation(20)[: 3 + 3 * step]
        results = [runtime.step(table, [slots[row] for row in chosen]) for runtime, (table, slots) in held.items()]
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-3)


def test_full_gpu_memory_is_recognised_and_small_batches_still_run(cpu: Runtime) -> None:
    limited = Runtime.load(bundle.builtin("digits"), device="cuda", gpu_memory_mb=64, fixed_batches=False)
    arguments = random_rows(cpu, 4096)
    with pytest.raises(Exception, match=r"memory|ALLOC") as raised:
        limited.refine(**arguments)
    assert classify(raised.value) == "memory"
    assert np.isfinite(limited.refine(**random_rows(cpu, 1))[1]).all()


def test_lost_gpu_is_recognised() -> None:
    pytest.importorskip("torch")
    code = f"""
import numpy as np
from concord.model import bundle
from concord.model.runtime import Runtime
from concord.model.runtime.device import classify

runtime = Runtime.load(bundle.builtin("digits"), device="cuda")
runtime.warm_up(1)
{LOSE}
for _ in range(2):
    try:
        runtime.warm_up(1)
    except Exception as error:
        print(classify(error), str(error)[:400].replace(chr(10), " "))
import os
os._exit(0)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    lines = process.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["lost", "lost"], process.stdout + process.stderr


def test_service_whose_gpu_is_lost_responds_with_503_and_ends_with_70(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(LOSE_DEVICE.format(file=str(tmp_path / "lose"), code=LOSE))
    (port,) = free_ports(1)
    supervisor = ["sh", "-c", RESTART_ONCE.format(file=tmp_path / "status"), "sh"]
    paths = ":".join([str(tmp_path), str(ROOT), *sys.path])
    with (
        running("--port", str(port), prefix=supervisor, PYTHONPATH=paths, CONCORD_DEVICE="cuda") as service,
        ThreadPoolExecutor(8) as pool,
    ):
        assert service.embed().status_code == 200
        (tmp_path / "lose").touch()
        responses = [pool.submit(service.embed) for _ in range(8)]
        assert {response.result().status_code for response in responses} == {503}
        status = tmp_path / "status"
        service.wait_for(lambda: status.exists() and status.read_text() == "70\n")
        service.wait_until_ready()
        assert service.embed().status_code == 200
