"""Bound buffers and CUDA graphs: which graphs are captured, and the GPU's path through the runtime on the CPU provider.

The CPU provider ignores what only a GPU can do, the capture itself.
"""

from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import onnxruntime
import pytest

from concord.model import bundle, runtime
from concord.model.bundle.manifest import graph_input
from concord.model.runtime import Runtime
from concord.model.runtime.bound_run import BoundRun, can_capture, device_array
from concord.model.runtime.branch_absent import branch_absent
from concord.model.runtime.device import Device
from concord.model.runtime.refinement_table import table, with_tables
from concord.model.runtime.skip_absent import skip_absent
from concord.service.inference.jobs import InferenceJob, RefinementLimits
from concord.service.inference.scheduler import NullObserver, Row, Scheduler
from tests.support.encoders import encoded_modalities
from tests.support.graphs import write_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # from ONNX Runtime


@pytest.mark.parametrize("name", ["digits", "birds"])
def test_graphs_with_branches_or_sizes_that_depend_on_data_are_not_captured(name: str) -> None:
    opened = bundle.read(bundle.builtin(name))
    graphs, names = opened.manifest.graphs, [graph_input(m.name) for m in opened.manifest.modalities]
    contents = {file: opened.content(file) for file in graphs.names}
    assert all(map(can_capture, contents.values()))
    refine = with_tables(contents[graphs.refine])
    assert can_capture(refine)
    assert not can_capture(branch_absent(refine, opened.content(bundle.WEIGHTS), list(map(table, names))))
    assert not can_capture(skip_absent(contents[graphs.encode], names))


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU provider with everything that Concord does on a GPU: fixed sizes, capturing sessions, no passes for the CPU."""
    monkeypatch.setattr(Device, "is_cpu", False)
    monkeypatch.setattr(runtime, "choose_device", lambda *_, **__: Device(graphs=True))


def refined(opened: Runtime) -> list[np.ndarray]:
    """Return the means of five refined rows, of different subsets."""
    scheduler = Scheduler(opened, max_batch=4, observer=NullObserver(), max_rows=8)
    scheduler.warm_up()
    generator = np.random.default_rng(0)
    row = {m.name: generator.random(m.shape).astype(m.dtype) for m in opened.modalities}
    rows = [
        Row(InferenceJob(dict(list(row.items())[: 1 + index % 3]), index, index, RefinementLimits(2)), monotonic())
        for index in range(5)
    ]
    scheduler.add(rows[:4])
    scheduler.add(rows[4:])
    while scheduler.active:
        scheduler.step()
    return [row.result.mean if hasattr(row.result, "mean") else pytest.fail(str(row.result)) for row in rows]


@pytest.mark.usefixtures("gpu_path")
def test_path_of_a_gpu_gives_the_results_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int | None] = []
    bind = BoundRun.__init__

    def recorded(self: BoundRun, *args: Any, **options: Any) -> None:
        bind(self, *args, **options)
        captured.append(self._options and int(self._options.get_run_config_entry("gpu_graph_id")))

    monkeypatch.setattr(BoundRun, "__init__", recorded)
    opened = Runtime.load(bundle.builtin("digits"), threads=1, max_batch=4)
    assert opened.captured_graphs == set(opened.bundle.manifest.graphs.names)
    assert opened.replay_golden() < 1e-3
    means = refined(opened)
    opened.blank_step(3)()
    assert None not in captured
    assert len(set(captured)) == len(captured) > len(opened.captured_graphs), "two buffers share a CUDA graph"
    monkeypatch.undo()
    for mean, expected in zip(means, refined(Runtime.load(bundle.builtin("digits"), threads=1)), strict=True):
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("gpu_path")
def test_graph_that_onnx_runtime_does_not_capture_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(onnxruntime.InferenceSession):
        def __init__(self, content: bytes, *args: Any, providers: Any, **options: Any) -> None:
            if providers[0][1].get("enable_cuda_graph") == "1":
                raise RuntimeError("This session cannot use the graph capture feature")
            super().__init__(content, *args, providers=providers, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing)
    opened = Runtime.load(bundle.builtin("digits"), threads=1, max_batch=4)
    assert opened.captured_graphs == set()
    assert "refine.onnx runs without CUDA graphs: This session cannot use the graph capture feature" in caplog.text
    assert opened.replay_golden() < 1e-3


@pytest.mark.usefixtures("gpu_path")
def test_frozen_encoders_run_at_any_size_and_are_not_captured(tmp_path: Path, tiny_facts: dict[str, Any]) -> None:
    """Their runs are not bound, and an unbound run of a capturing session would replay the graph of another size."""
    modalities, files = encoded_modalities(tmp_path)
    opened = Runtime(write_bundle(tmp_path / "bundle", modalities, tiny_facts, encoders=files), threads=1)
    assert opened.captured_graphs == set(opened.bundle.manifest.graphs.names)
    for encoder in opened.encoders.values():
        assert len(encoder.features(encoder.blank(3))) == 3


def test_bound_run_reads_and_writes_the_same_memory(tiny_bundle: bundle.Bundle) -> None:
    opened = Runtime(tiny_bundle, threads=1)
    session = opened._sessions[tiny_bundle.manifest.graphs.decode["vector"]]
    z, value = np.zeros((2, opened.latent), np.float32), np.zeros((2, 5), np.float32)
    run = BoundRun(session, {"z": device_array(z, Device())}, {"value": device_array(value, Device())}, capture=False)
    for number in (0.5, -1.0):
        run({"z": np.full_like(z, number)})
        assert (z == number).all()
        np.testing.assert_array_equal(value, opened.decode("vector", np.full_like(z, number)))


@pytest.mark.usefixtures("gpu_path")
def test_only_capturing_sessions_record_cuda_graphs() -> None:
    assert Device("cuda", graphs=True).capturing_providers[0][1]["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in Device("cuda", graphs=True).providers[0][1]
