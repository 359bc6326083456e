"""Devices: options of the providers, threads in a container, kinds of errors, and a GPU that does not work.

No GPU is used. What a GPU says is taken from texts of ONNX Runtime and CUDA.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as pybind

from concord.model import bundle
from concord.model.runtime import Runtime, device
from concord.model.runtime.device import Device, choose_device, classify

OPENED = bundle.read(bundle.builtin("digits"))
GRAPHS = 6


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that sets the limit of processes and threads, and their number."""

    def limit(maximum: str, current: int) -> None:
        (tmp_path / "pids.max").write_text(f"{maximum}\n")
        (tmp_path / "pids.current").write_text(f"{current}\n")

    monkeypatch.setattr(device, "_PIDS", tmp_path)
    return limit


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's GPU package, without its libraries."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("cannot preload libcudnn.so.9"))


def test_gpu_is_visible_by_its_device_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not device.gpu_is_visible()
    (tmp_path / "nvidia0").touch()
    assert device.gpu_is_visible()


@pytest.mark.usefixtures("cuda")
def test_cuda_multiplies_in_float32_on_the_chosen_gpu() -> None:
    (provider, options), cpu = choose_device("cuda:1", memory_mb=512).providers
    assert (provider, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["use_tf32"] == "0"
    assert (options["device_id"], options["gpu_mem_limit"]) == ("1", str(512 << 20))
    assert all(isinstance(value, str) for value in options.values()), "ONNX Runtime takes strings"
    assert "gpu_mem_limit" not in choose_device("cuda").providers[0][1]


@pytest.mark.usefixtures("cuda")
def test_tf32_is_opt_in_and_allows_larger_differences() -> None:
    assert choose_device("cuda", tf32=True).providers[0][1]["use_tf32"] == "1"
    assert choose_device("cuda", tf32=True).tolerance > choose_device("cuda").tolerance
    assert choose_device("cpu", tf32=True).tolerance == choose_device("cuda").tolerance == 1e-3


@pytest.mark.usefixtures("cuda")
def test_loading_cuda_writes_nothing_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    choose_device("cuda")
    assert capsys.readouterr() == ("", "cannot preload libcudnn.so.9\n")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:-1"])
def test_unknown_device_raises_with_those_that_exist(name: str) -> None:
    with pytest.raises(bundle.BundleError, match="it is auto, cpu, cuda, or cuda:N"):
        choose_device(name)


def test_device_names() -> None:
    assert [str(Device()), str(Device("cuda")), str(Device("cuda", 2))] == ["cpu", "cuda", "cuda:2"]


def test_threads_are_at_most_16_and_one_on_a_gpu(cgroup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup("max", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    assert Device().threads(0, GRAPHS) == 16
    assert Device().threads(64, GRAPHS) == 64
    assert Device("cuda").threads(0, GRAPHS) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert Device().threads(0, GRAPHS) == 2


def test_threads_fit_into_the_limit_of_the_container(cgroup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose threads do not start waits for ever: no error, no log."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    cgroup("128", 10)
    assert Device().threads(0, GRAPHS) == 1 + (128 - 10 - device.SPARE_THREADS) // GRAPHS
    cgroup("32", 30)
    assert Device().threads(0, GRAPHS) == 1
    with pytest.raises(bundle.BundleError, match=r"16 threads for each of 6 graphs .* 0 that .* Lower CONCORD_THREADS"):
        Device().threads(16, GRAPHS)


def test_bundle_on_a_large_host_starts_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime starts them for each graph when it opens, one less than an operator uses."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    gc.collect()  # sessions of other tests would end their threads meanwhile
    before = len(list(Path("/proc/self/task").iterdir()))
    runtime = Runtime(OPENED)
    started = len(list(Path("/proc/self/task").iterdir())) - before
    assert started <= GRAPHS * 15
    assert runtime.replay_golden() < 1e-3


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Available memory of 5758720 is smaller than requested bytes of 8388608", "memory"),
        ("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 123456", "memory"),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=x", "memory"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "memory"),
        ("CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "memory"),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x", "lost"),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", "lost"),
        ("CUDA failure 999: unknown error", "lost"),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", "lost"),
        ("CUDA failure 1: invalid argument", "other"),
        ("CUDA failure 7000: not a number of CUDA", "other"),
        ("Non-zero status code returned while running Gemm node", "other"),
    ],
)
def test_errors_have_the_kind_that_their_text_says(message: str, kind: str) -> None:
    assert classify(RuntimeError(message)) == kind


def test_memory_error_of_python_is_of_memory() -> None:
    assert classify(MemoryError()) == "memory"


CAPPED = """
import numpy as np, onnxruntime as ort, sys
from concord.model import bundle
from concord.model.runtime.device import classify
opened = bundle.read(bundle.builtin("digits"))
arena = ort.OrtArenaCfg({"max_mem": 4 << 20})
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
ort.create_and_register_allocator(memory, arena)
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.use_env_allocators", "1")
weights = opened.content(bundle.WEIGHTS)
options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
session = ort.InferenceSession(opened.content("decode-photo.onnx"), options, providers=["CPUExecutionProvider"])
run = lambda rows: session.run(None, {"z": np.zeros((rows, opened.manifest.latent), np.float32)})
try:
    run(256)
except Exception as error:
    print(classify(error), error)
run(1)
print("runs again")
"""


def test_capped_memory_of_onnx_runtime_is_recognised() -> None:
    """The real words of its allocator, of which a GPU has the same one."""
    printed = subprocess.run([sys.executable, "-c", CAPPED], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("memory ")
    assert printed.endswith("runs again\n")


def test_error_of_a_provider_does_not_move_a_graph_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's fallback would print, replace the session and answer."""
    runtime = Runtime(OPENED, threads=1)
    session = runtime._encode

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(working, name)

        def run(self, *_: Any) -> None:
            raise pybind.EPFail("CUDNN_STATUS_EXECUTION_FAILED")

    session._sess, working = Failing(), session._sess
    inputs = {m.name: np.zeros((1, *m.shape), m.dtype) for m in runtime.modalities}
    with pytest.raises(pybind.EPFail):
        runtime.encode(inputs, np.ones((1, len(inputs)), bool))
    session._sess = working
    monkeypatch.setattr(session, "get_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(bundle.BundleError, match="a graph runs on another device than cpu"):
        runtime.replay_golden()


class NoCudnn(Runtime):
    """Opens on CUDA, and fails at the first run there."""

    def _is_on_device(self, _: Any) -> bool:
        return True

    def decode(self, modality: str, z: Any) -> Any:
        if not self.device.is_cpu:
            raise RuntimeError("libcudnn.so.9: cannot open shared object file")
        return super().decode(modality, z)


@pytest.mark.usefixtures("cuda")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # from ONNX Runtime
def test_auto_uses_the_cpu_if_no_row_runs_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    runtime = NoCudnn(OPENED, device="auto", threads=1)
    assert runtime.device.is_cpu
    assert "the graphs open on cuda and do not run there (libcudnn.so.9" in caplog.text
    assert runtime.replay_golden() < 1e-3
