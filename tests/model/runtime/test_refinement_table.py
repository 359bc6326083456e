"""Rows in the refinement table: steps return what the stateless path returns, and a slot never holds two rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concord.model import bundle
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.refinement_table import POSTERIOR, RefinementTable, table

CAPACITY = 6
SIZES = (1, 4)


@pytest.fixture(scope="module")
def free(tiny_bundle: bundle.Bundle) -> Runtime:
    """At any batch size."""
    return Runtime(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def fixed(tiny_bundle: bundle.Bundle) -> Runtime:
    """At fixed batch sizes, as on a GPU."""
    return Runtime(tiny_bundle, threads=1, max_batch=4, fixed_batches=True)


def arguments(runtime: Runtime, make_rows: Any, rows: int, seed: int = 0) -> tuple[Any, ...]:
    """Return arguments of ``Runtime.refine``: rows of random subsets."""
    generator = np.random.default_rng(seed)
    inputs = {name: x.numpy() for name, x in make_rows(runtime.modalities, rows, seed).items()}
    present = (generator.integers(1, 16, rows)[:, None] >> np.arange(4) & 1).astype(bool)
    q, anchor = (Posterior(*generator.normal(0, 0.5, (2, rows, runtime.latent)).astype(np.float32)) for _ in range(2))
    noise = generator.normal(size=(rows, runtime.noise_samples, runtime.latent)).astype(np.float32)
    return inputs, present, q, anchor, noise


def table_rows(runtime: Runtime, values: tuple[Any, ...]) -> dict[str, np.ndarray]:
    inputs, present, q, anchor, noise = values
    return runtime.table_rows(inputs, present, q.parameters, anchor.parameters, noise)


def part(values: tuple[Any, ...], rows: Any) -> tuple[Any, ...]:
    """Return some rows of arguments of ``Runtime.refine``."""
    inputs, present, q, anchor, noise = values
    q, anchor = (Posterior(p.mean[rows], p.log_var[rows]) for p in (q, anchor))
    return {name: array[rows] for name, array in inputs.items()}, present[rows], q, anchor, noise[rows]


class Serial:
    """One row, refined alone and without a table."""

    def __init__(self, runtime: Runtime, row: tuple[Any, ...]) -> None:
        self.row, self._runtime = row, runtime

    def step(self) -> tuple[np.ndarray, float]:
        inputs, present, q, anchor, noise = self.row
        q, objective = self._runtime.refine(inputs, present, q, anchor, noise)
        self.row = inputs, present, q, anchor, noise
        return q.parameters[0], float(objective[0])


@pytest.mark.parametrize("sizes", ["any", "fixed"])
def test_steps_of_any_rows_equal_those_of_each_row_alone(sizes: str, free: Runtime, fixed: Runtime, make_rows: Any) -> None:
    runtime = free if sizes == "any" else fixed

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.sampled_from(["take", "step", "step", "release", "fail"]), st.integers(0, 1000)), max_size=12))
    def run(operations: list[tuple[str, int]]) -> None:
        held = runtime.refinement_table(CAPACITY)
        rows: dict[int, Serial] = {}
        for operation, number in operations:
            if operation == "take" and held.free:
                values = arguments(runtime, make_rows, 1 + number % min(3, held.free), number)
                slots = held.take(table_rows(runtime, values))
                assert not rows.keys() & slots, "a slot holds two rows"
                rows |= {slot: Serial(free, part(values, [index])) for index, slot in enumerate(slots)}
            elif operation == "step" and rows:
                slots = [slot for index, slot in enumerate(rows) if index == 0 or number >> index & 1][: SIZES[-1]]
                posteriors, objectives = runtime.step(held, slots)
                for slot, posterior, objective in zip(slots, posteriors, objectives, strict=True):
                    expected, expected_objective = rows[slot].step()
                    np.testing.assert_allclose(posterior, expected, rtol=2e-4, atol=2e-4)
                    np.testing.assert_allclose(objective, expected_objective, rtol=1e-4, atol=1e-3)
            elif operation == "release" and rows:
                slot = list(rows)[number % len(rows)]
                del rows[slot]
                held.release([slot])
            elif operation == "fail" and rows:
                with pytest.raises(Exception, match="out of data bounds"):
                    runtime.step(held, [*list(rows)[:1], CAPACITY + 1])
            assert held.free + len(rows) == CAPACITY, "a slot leaked"

    run()


def test_step_that_fails_changes_no_row(free: Runtime, make_rows: Any) -> None:
    held = free.refinement_table(CAPACITY)
    slots = held.take(table_rows(free, arguments(free, make_rows, 3)))
    before = {name: values.numpy().copy() for name, values in held._tables.items()}
    with pytest.raises(Exception, match="out of data bounds"):
        free.step(held, [*slots, CAPACITY + 1])
    for name, values in before.items():
        np.testing.assert_array_equal(held._tables[name].numpy(), values)


def test_rows_that_cannot_be_written_take_no_slot(free: Runtime, make_rows: Any) -> None:
    held = free.refinement_table(CAPACITY)
    rows = table_rows(free, arguments(free, make_rows, 3))
    with pytest.raises(ValueError, match="shape mismatch"):
        held.take({**rows, table("noise"): rows[table("noise")][..., :2]})
    assert held.free == CAPACITY
    with pytest.raises(RuntimeError, match="7 rows need slots, and 6 are free"):
        held.take(table_rows(free, arguments(free, make_rows, CAPACITY + 1)))
    assert sorted(held.take(table_rows(free, arguments(free, make_rows, CAPACITY)))) == list(range(CAPACITY))
    assert held.free == 0


def test_tables_never_move_and_only_the_posterior_changes(fixed: Runtime, make_rows: Any) -> None:
    held = fixed.refinement_table(CAPACITY)
    slots = held.take(table_rows(fixed, arguments(fixed, make_rows, 3)))
    addresses = {name: values.data_ptr() for name, values in held._tables.items()}
    before = {name: values.numpy().copy() for name, values in held._tables.items()}
    for _ in range(3):
        posteriors, _ = fixed.step(held, slots)
    assert {name: values.data_ptr() for name, values in held._tables.items()} == addresses
    changed = {name for name, values in held._tables.items() if not np.array_equal(values.numpy(), before[name])}
    assert changed == {POSTERIOR}
    np.testing.assert_array_equal(held._tables[POSTERIOR].numpy()[slots], posteriors)


def test_results_of_a_step_outlive_the_next_one(free: Runtime, make_rows: Any) -> None:
    held = free.refinement_table(CAPACITY)
    slots = held.take(table_rows(free, arguments(free, make_rows, 2)))
    first, objectives = free.step(held, slots)
    kept = first.copy(), objectives.copy()
    free.step(held, slots)
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(objectives, kept[1])


def test_padding_rows_change_no_result_even_if_they_diverge(fixed: Runtime, make_rows: Any) -> None:
    values = arguments(fixed, make_rows, 3)
    results = []
    for spoil in (False, True):
        held = fixed.refinement_table(CAPACITY)
        slots = held.take(table_rows(fixed, values))
        if spoil:
            held._tables[POSTERIOR].numpy()[CAPACITY] = np.nan  # the memory itself, on a CPU
        results.append([*fixed.step(held, slots), *fixed.step(held, slots)])
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert np.isfinite(actual).all()


def test_more_rows_than_the_largest_size_step_in_several_runs(free: Runtime, fixed: Runtime, make_rows: Any) -> None:
    values = arguments(free, make_rows, CAPACITY)
    results = []
    for runtime in (free, fixed):
        held = runtime.refinement_table(CAPACITY)
        results.append(runtime.step(held, held.take(table_rows(runtime, values))))
        assert set(held._runs) == ({CAPACITY} if runtime is free else {4}), "4 rows, and 2 in a batch of 4"
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_number_of_rows_in_a_table_equals_the_stateless_path(tiny_bundle: bundle.Bundle, make_rows: Any) -> None:
    free, fixed = Runtime(tiny_bundle, threads=1), Runtime(tiny_bundle, threads=1, max_batch=64, fixed_batches=True)
    values = arguments(free, make_rows, 64)
    for count in range(1, 65):
        expected, expected_objectives = free.refine(*part(values, slice(count)))
        for runtime in (free, fixed):
            held = runtime.refinement_table(64)
            slots = held.take(table_rows(runtime, part(values, slice(count))))
            posteriors, objectives = runtime.step(held, slots)
            np.testing.assert_allclose(posteriors, expected.parameters, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(objectives, expected_objectives, rtol=1e-5, atol=1e-5)


def test_steps_are_counted_with_the_graphs_other_runs(tiny_bundle: bundle.Bundle, make_rows: Any) -> None:
    runtime = Runtime(tiny_bundle, threads=1, max_batch=4, fixed_batches=True)
    held = runtime.refinement_table(CAPACITY)
    slots = held.take(table_rows(runtime, arguments(runtime, make_rows, 3)))
    held.warm_up()
    graph = runtime.fixed_graphs[tiny_bundle.manifest.graphs.refine]
    assert not graph.runs, "a warm-up is not counted"
    runtime.step(held, slots)
    assert (dict(graph.runs), graph.padding) == ({4: 1}, 1)


def test_warm_up_runs_every_fixed_size_on_no_row(fixed: Runtime, make_rows: Any) -> None:
    """The run that captures a CUDA graph executes the graph several times, so it must not be a step of a row."""
    held: RefinementTable = fixed.refinement_table(CAPACITY)
    values = arguments(fixed, make_rows, CAPACITY)
    held.take(table_rows(fixed, values))
    before = held._tables[POSTERIOR].numpy()[:CAPACITY].copy()
    held.warm_up()
    assert set(held._runs) == set(SIZES)
    np.testing.assert_array_equal(held._tables[POSTERIOR].numpy()[:CAPACITY], before)
