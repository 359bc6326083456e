"""Graphs at fixed batch sizes: padded rows change no result, and runs and padding are counted."""

from typing import Any

import numpy as np
import pytest

from concord.model import bundle
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.device import Device
from concord.model.runtime.fixed_batches import FixedBatches, batch_sizes


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 4)), (5, (1, 4, 5)), (32, (1, 4, 16, 32)), (64, (1, 4, 16, 64)), (65, (1, 4, 16, 64, 65))],
)
def test_batch_sizes_are_powers_of_four_and_the_largest(largest: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(largest) == sizes


class Recorder:
    """A session that squares ``x`` and records the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, output_names: Any, input_feed: Any) -> list[Any]:
        assert list(output_names) == ["square"]
        self.sizes.append(len(input_feed["x"]))
        return [input_feed["x"] ** 2]


@pytest.mark.parametrize(
    ("rows", "sizes", "padding"), [(1, [1], 0), (2, [4], 2), (4, [4], 0), (5, [16], 11), (16, [16], 0), (37, [16, 16, 16], 11)]
)
def test_rows_run_in_the_smallest_sizes_that_fit(rows: int, sizes: list[int], padding: int) -> None:
    session = Recorder()
    graph = FixedBatches(session, (1, 4, 16))
    x = np.arange(3.0 * rows).reshape(rows, 3)
    (square,) = graph.run(["square"], {"x": x})
    np.testing.assert_array_equal(square, x**2)
    assert session.sizes == sizes
    assert graph.padding == padding
    assert sum(graph.runs.values()) == len(sizes)


@pytest.fixture(scope="module")
def runtimes(tiny_bundle: bundle.Bundle) -> tuple[Runtime, Runtime]:
    """At any size, and at fixed ones."""
    return Runtime(tiny_bundle, threads=1), Runtime(tiny_bundle, threads=1, max_batch=32, fixed_batches=True)


def test_every_graph_returns_the_same_at_every_number_of_rows(runtimes: tuple[Runtime, Runtime], make_rows: Any) -> None:
    free, fixed = runtimes
    assert fixed.batch_sizes == (1, 4, 16, 32)
    generator = np.random.default_rng(0)
    rows = 65
    inputs = {name: x.numpy() for name, x in make_rows(free.modalities, rows, 0).items()}
    present = (generator.integers(1, 16, rows)[:, None] >> np.arange(4) & 1).astype(bool)
    q, anchor = (Posterior(*generator.normal(0, 0.5, (2, rows, free.latent)).astype(np.float32)) for _ in range(2))
    noise = generator.normal(size=(rows, free.noise_samples, free.latent)).astype(np.float32)
    for count in (*range(1, 34), 64, 65):
        part = {name: values[:count] for name, values in inputs.items()}
        start, base = (Posterior(p.mean[:count], p.log_var[:count]) for p in (q, anchor))
        results = []
        for runtime in (free, fixed):
            encoded = runtime.encode(part, present[:count])
            refined, objective = runtime.refine(part, present[:count], start, base, noise[:count])
            sample = runtime.sample(start, noise[:count, 0])
            decoded = [runtime.decode(m.name, sample) for m in runtime.modalities]
            results.append([encoded.mean, encoded.log_var, refined.mean, refined.log_var, objective, sample, *decoded])
        for expected, padded in zip(*results, strict=True):
            assert padded.shape == expected.shape
            np.testing.assert_allclose(padded, expected, rtol=1e-5, atol=1e-6)


def test_captured_runs_return_the_same_from_buffers_that_never_move(runtimes: tuple[Runtime, Runtime], make_rows: Any) -> None:
    """The CPU runs the same code and ignores that it is to capture: every graph, at each number of rows, twice."""
    free, fixed = runtimes
    rows = 20
    generator = np.random.default_rng(1)
    inputs = {name: x.numpy() for name, x in make_rows(free.modalities, rows, 1).items()}
    present = (generator.integers(1, 16, rows)[:, None] >> np.arange(4) & 1).astype(bool)
    z = generator.normal(size=(rows, free.latent)).astype(np.float32)
    encoded = free.encode(inputs, present)
    graphs = {file: FixedBatches(session, (1, 4, 16), capture_on=Device()) for file, session in fixed._sessions.items()}
    names = free.bundle.manifest.graphs
    for count in (*range(1, rows + 1), 3):
        feed = {**{name: array[:count] for name, array in inputs.items()}, "present": present[:count]}
        mean, log_var = graphs[names.encode].run(["mean", "log_var"], feed)
        np.testing.assert_allclose(mean, encoded.mean[:count], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(log_var, encoded.log_var[:count], rtol=1e-5, atol=1e-6)
        for name, file in names.decode.items():
            (value,) = graphs[file].run(["value"], {"z": z[:count]})
            np.testing.assert_allclose(value, free.decode(name, z[:count]), rtol=1e-5, atol=1e-6)
    buffers = [
        value.data_ptr()
        for run in graphs[names.encode]._captured.values()
        for value in (*run._inputs.values(), *run.outputs.values())
    ]
    assert len(set(buffers)) == len(buffers) == 3 * 7, "one buffer for each input and output at each size"


def test_runs_are_counted_by_graph_and_size(tiny_bundle: bundle.Bundle) -> None:
    runtime = Runtime(tiny_bundle, threads=1, max_batch=4, fixed_batches=True)
    runtime.decode("vector", np.zeros((3, runtime.latent), dtype=np.float32))
    counts = {file: (dict(graph.runs), graph.padding) for file, graph in runtime.fixed_graphs.items()}
    assert counts.pop(tiny_bundle.manifest.graphs.decode["vector"]) == ({4: 1}, 1)
    assert all(count == ({}, 0) for count in counts.values())
    assert Runtime(tiny_bundle, threads=1).fixed_graphs == {}


def test_sizes_are_fixed_only_on_a_gpu_by_default(tiny_bundle: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(tiny_bundle, threads=1, max_batch=32)
    assert runtime.batch_sizes == (1, 32)
    with monkeypatch.context() as patch:
        patch.setattr(Device, "is_cpu", False)
        assert runtime.batch_sizes == (1, 4, 16, 32)
    assert runtime.replay_golden() == pytest.approx(
        Runtime(tiny_bundle, threads=1, max_batch=3, fixed_batches=True).replay_golden(), abs=1e-5
    )
