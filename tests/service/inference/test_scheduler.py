"""Rows are batched together without influence on each other: on their numbers, their waiting time, or their errors."""

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from time import monotonic
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concord.model import bundle
from concord.model.modality import TextModality, collate
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.device import DeviceLostError
from concord.service.inference import scheduler as scheduler_module
from concord.service.inference.jobs import InferenceJob, InferenceResult, RefinementLimits
from concord.service.inference.refinement import Stream, antithetic, noise
from concord.service.inference.scheduler import TICK_SECONDS, NullObserver, Row, Scheduler
from tests.support.runtimes import read_rows


class Recorder(NullObserver):
    """Keeps all measurements."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.stages: list[str] = []
        self.waits: list[float] = []
        self.refinements: list[tuple[int, float, str]] = []

    def batch(self, size: int) -> None:
        self.batches.append(size)

    def stage(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(name)

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def refined(self, steps: int, gain: float, stopped: str) -> None:
        self.refinements.append((steps, gain, stopped))


class FaultyRuntime(Runtime):
    """The real graphs, with a fault injected before or after them.

    ``before(stage, inputs)`` may raise. ``after(stage, inputs, outputs)`` returns other outputs.
    """

    before: Callable[[str, Any], None] | None = None
    after: Callable[[str, Any, Any], Any] | None = None

    def encode(self, inputs: Any, present: Any) -> Posterior:
        return self._run("encode", inputs, lambda: super(FaultyRuntime, self).encode(inputs, present))

    def step(self, held: Any, slots: Any) -> Any:
        return self._run("refine", read_rows(self, held, slots), lambda: super(FaultyRuntime, self).step(held, slots))

    def sample(self, posterior: Any, noise: Any) -> Any:
        return self._run("sample", noise, lambda: super(FaultyRuntime, self).sample(posterior, noise))

    def decode(self, modality: str, z: Any) -> Any:
        return self._run("decode", z, lambda: super(FaultyRuntime, self).decode(modality, z))

    def _run(self, stage: str, inputs: Any, graph: Callable[[], Any]) -> Any:
        if self.before:
            self.before(stage, inputs)
        outputs = graph()
        return self.after(stage, inputs, outputs) if self.after else outputs


@pytest.fixture
def faulty() -> FaultyRuntime:
    return FaultyRuntime(bundle.read(bundle.builtin("digits")), threads=1)


def complete_row(runtime: Runtime, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        m.name: generator.integers(0, len(m.alphabet), m.shape)
        if isinstance(m, TextModality)
        else generator.random(m.shape, dtype=np.float32)
        for m in runtime.modalities
    }


def mixed_jobs(runtime: Runtime) -> list[InferenceJob]:
    """Return jobs of every subset, with and without refinement and generation; seeds and positions differ."""
    names = [m.name for m in runtime.modalities]
    subsets = [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]
    jobs = []
    for index, subset in enumerate(subsets * 2):
        row = complete_row(runtime, index)
        jobs.append(
            InferenceJob(
                row={name: row[name] for name in subset},
                seed=index % 3,
                index=index,
                refine=RefinementLimits(steps=index % 4),
                sample_embedding=index % 2 == 0,
                targets=tuple(names[: index % (len(names) + 1)]),
                num_samples=1 + index % 3,
                latent="mean" if index % 5 == 0 else "sample",
                temperature=0.5 + index % 2,
            )
        )
    return jobs


def run(scheduler: Scheduler, jobs: Sequence[InferenceJob]) -> list[Any]:
    """Return the results of the jobs, which are added together."""
    rows = [Row(job, monotonic()) for job in jobs]
    scheduler.add(rows)
    while scheduler.active:
        scheduler.step()
    return [row.result for row in rows]


def make_scheduler(runtime: Runtime, observer: NullObserver | None = None, max_batch: int = 64) -> Scheduler:
    return Scheduler(runtime, max_batch=max_batch, observer=observer or NullObserver())


def assert_same(actual: InferenceResult, expected: InferenceResult, tolerance: float = 1e-5) -> None:
    def assert_close(a: Any, b: Any) -> None:
        if a is not None or b is not None:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    assert_close(actual.mean, expected.mean)
    assert_close(actual.log_var, expected.log_var)
    assert_close(actual.sample, expected.sample)
    assert actual.generated.keys() == expected.generated.keys()
    for name, values in actual.generated.items():
        assert_close(values, expected.generated[name])
    assert (actual.refinement is None) == (expected.refinement is None)
    if actual.refinement and expected.refinement:
        assert (actual.refinement.steps, actual.refinement.stopped) == (expected.refinement.steps, expected.refinement.stopped)
        assert_close(actual.refinement.after, expected.refinement.after)


class TestResults:
    def test_result_does_not_depend_on_other_rows_or_batch_size(self, runtime: Runtime) -> None:
        jobs = mixed_jobs(runtime)
        expected = [run(make_scheduler(runtime), [job])[0] for job in jobs]
        for max_batch in (64, 3):
            for result, other in zip(run(make_scheduler(runtime, max_batch=max_batch), jobs), expected, strict=True):
                assert_same(result, other)

    def test_same_jobs_twice_get_identical_results(self, runtime: Runtime) -> None:
        jobs = mixed_jobs(runtime)
        for first, second in zip(run(make_scheduler(runtime), jobs), run(make_scheduler(runtime), jobs), strict=True):
            assert_same(first, second, tolerance=0)

    def test_other_seed_or_position_gives_other_samples(self, runtime: Runtime) -> None:
        row = complete_row(runtime, 0)
        keys = [(0, 0), (1, 0), (0, 1)]
        results = run(
            make_scheduler(runtime),
            [InferenceJob(row, seed, index, sample_embedding=True, targets=("digit",), num_samples=2) for seed, index in keys],
        )
        assert len({result.sample.tobytes() for result in results}) == 3
        assert len({sample.tobytes() for result in results for sample in result.generated["digit"]}) == 6
        assert len({result.mean.tobytes() for result in results}) == 1

    def test_result_without_refinement_is_the_encoders(self, runtime: Runtime) -> None:
        jobs = [InferenceJob(job.row, 0, index) for index, job in enumerate(mixed_jobs(runtime))]
        posterior = runtime.encode(*collate(runtime.modalities, [job.row for job in jobs]))
        for index, result in enumerate(run(make_scheduler(runtime), jobs)):
            np.testing.assert_array_equal(result.mean, posterior.mean[index])
            np.testing.assert_array_equal(result.log_var, posterior.log_var[index])
            assert (result.refinement, result.sample, result.generated) == (None, None, {})

    @pytest.mark.parametrize(("latent", "temperature"), [("mean", 1.0), ("sample", 0.0), ("sample", 0.7)])
    def test_generated_values_are_decoded_from_scaled_samples(self, runtime: Runtime, latent: Any, temperature: float) -> None:
        row = complete_row(runtime, 0)
        (result,) = run(
            make_scheduler(runtime, max_batch=2),
            [InferenceJob(row, 5, 3, targets=("photo", "word"), num_samples=5, latent=latent, temperature=temperature)],
        )
        posterior = Posterior(*(np.repeat(part[None], 5, axis=0) for part in (result.mean, result.log_var)))
        distance = runtime.sample(posterior, noise(5, 3, Stream.GENERATE, 5, runtime.latent)) - result.mean
        z = result.mean + (temperature if latent == "sample" else 0) * distance
        assert result.generated.keys() == {"photo", "word"}
        for name, values in result.generated.items():
            np.testing.assert_allclose(values, runtime.decode(name, z.astype(np.float32)), rtol=1e-4, atol=1e-5)

    def test_sampled_embedding_ignores_the_temperature(self, runtime: Runtime) -> None:
        job = InferenceJob(complete_row(runtime, 0), 5, 3, sample_embedding=True, temperature=0.0)
        (result,) = run(make_scheduler(runtime), [job])
        eps = noise(5, 3, Stream.EMBED, 1, runtime.latent)[0]
        expected = runtime.sample(Posterior(result.mean[None], result.log_var[None]), eps[None])[0]
        np.testing.assert_allclose(result.sample, expected, rtol=1e-4, atol=1e-5)

    def test_non_finite_samples_fail_their_row_only(self, faulty: FaultyRuntime, runtime: Runtime) -> None:
        jobs = [InferenceJob(complete_row(runtime, i), 9, i, sample_embedding=True, targets=("word",)) for i in range(3)]
        noise_of_1 = noise(9, 1, Stream.EMBED, 1, runtime.latent)[0]

        def spoil(stage: str, inputs: Any, outputs: Any) -> Any:
            return np.where((inputs == noise_of_1).all(axis=1)[:, None], np.nan, outputs) if stage == "sample" else outputs

        faulty.after = spoil
        first, failed, last = run(make_scheduler(faulty), jobs)
        assert isinstance(failed, FloatingPointError)
        for index, result in ((0, first), (2, last)):
            assert_same(result, run(make_scheduler(runtime), [jobs[index]])[0])


class TestRefinement:
    @pytest.mark.parametrize("steps", [1, 2, 5, 20])
    def test_refinement_reports_the_objective_and_never_lowers_it(self, runtime: Runtime, steps: int) -> None:
        """``after`` equals the objective of the returned posterior, evaluated again by the runtime."""
        jobs = [InferenceJob(job.row, job.seed, job.index, RefinementLimits(steps, trace=True)) for job in mixed_jobs(runtime)]
        for job, result in zip(jobs, run(make_scheduler(runtime), jobs), strict=True):
            refinement = result.refinement
            assert (refinement.steps, len(refinement.trace), refinement.stopped) == (steps, steps + 1, "steps")
            assert refinement.before == refinement.trace[0]
            assert refinement.after == max(refinement.trace) >= refinement.before
            complete = len(job.row) == len(runtime.modalities)
            assert refinement.objective == ("elbo" if complete else "observed")
            inputs, present = collate(runtime.modalities, [job.row])
            start = runtime.encode(inputs, present)
            zeros = np.zeros((1, runtime.latent), np.float32)
            anchor = Posterior(zeros, zeros) if complete else start
            eps = antithetic(
                noise(job.seed, job.index, Stream.REFINE, (runtime.noise_samples + 1) // 2, runtime.latent),
                runtime.noise_samples,
            )
            for posterior, expected in (
                (start, refinement.before),
                (Posterior(result.mean[None], result.log_var[None]), refinement.after),
            ):
                _, objective = runtime.refine(inputs, present, posterior, anchor, eps[None])
                np.testing.assert_allclose(objective[0], expected, rtol=1e-5)

    def test_generation_uses_the_refined_posterior(self, runtime: Runtime) -> None:
        row = {"word": complete_row(runtime, 0)["word"]}
        job = InferenceJob(row, 0, 0, RefinementLimits(5), targets=("digit",), latent="mean")
        (result,) = run(make_scheduler(runtime), [job])
        np.testing.assert_allclose(result.generated["digit"], runtime.decode("digit", result.mean[None]), atol=1e-5)

    def test_tolerance_and_budget_stop_refinement(self, runtime: Runtime) -> None:
        row = complete_row(runtime, 0)
        limits = [
            RefinementLimits(50, tolerance=1e9),
            RefinementLimits(50, budget_ms=0.0),
            RefinementLimits(2, tolerance=-1e9, budget_ms=1e9),
        ]
        results = run(make_scheduler(runtime), [InferenceJob(row, 0, i, refine) for i, refine in enumerate(limits)])
        assert [(r.refinement.steps, r.refinement.stopped) for r in results] == [(1, "tolerance"), (0, "budget"), (2, "steps")]
        assert [r.refinement.trace for r in results] == [None] * 3

    def test_rows_beyond_max_batch_advance_in_turns(self, runtime: Runtime) -> None:
        """Seven rows, two in a batch: no row is two steps ahead of another."""
        scheduler = make_scheduler(runtime, max_batch=2)
        limits = RefinementLimits(steps=3, trace=True)
        rows = [Row(InferenceJob(complete_row(runtime, i), 0, i, limits), monotonic()) for i in range(7)]
        for start in range(0, 7, 2):
            scheduler.add(rows[start : start + 2])
        finished: list[int] = []
        while scheduler.active:
            finished += [rows.index(row) for row in scheduler.step()]
        assert finished == list(range(7))

    def test_step_on_a_cpu_takes_as_many_rows_as_its_threads_compute_well(self, faulty: FaultyRuntime) -> None:
        sizes: list[int] = []
        faulty.before = lambda stage, inputs: sizes.append(len(inputs["present"])) if stage == "refine" else None
        assert faulty.step_rows == 16
        jobs = [InferenceJob(complete_row(faulty, i), 0, i, RefinementLimits(steps=1)) for i in range(40)]
        run(make_scheduler(faulty), jobs)
        assert (max(sizes), sum(sizes)) == (16, 80)

    def test_long_refinement_does_not_delay_a_short_one(self, runtime: Runtime) -> None:
        scheduler = make_scheduler(runtime)
        long = Row(InferenceJob(complete_row(runtime, 0), 0, 0, RefinementLimits(steps=50)), monotonic())
        unrefined = Row(InferenceJob(complete_row(runtime, 1), 0, 0), monotonic())
        short = Row(InferenceJob(complete_row(runtime, 2), 0, 0, RefinementLimits(steps=1)), monotonic())
        assert scheduler.add([long]) == []
        scheduler.step()
        assert scheduler.add([unrefined, short]) == [unrefined]
        finished = [row for _ in range(4) for row in scheduler.step()]  # in one batch, or in turns if that takes too long
        assert finished == [short]
        assert (scheduler.active, long.result) == (1, None)

    def test_only_rows_of_one_subset_step_together(self, faulty: FaultyRuntime) -> None:
        """A decoder then never runs for a modality that no row of the batch has. Every subset gets its turn."""
        batches: list[set[bytes]] = []

        def record(stage: str, inputs: Any) -> None:
            if stage == "refine":
                batches.append({mask.tobytes() for mask in inputs["present"]})

        faulty.before = record
        jobs = [InferenceJob(job.row, 0, index, RefinementLimits(2)) for index, job in enumerate(mixed_jobs(faulty))]
        run(make_scheduler(faulty), jobs)
        assert [len(masks) for masks in batches] == [1] * 21  # three evaluations of each of seven subsets
        assert all(len(set().union(*batches[turn : turn + 7])) == 7 for turn in (0, 7, 14))

    def test_slow_steps_shrink_while_unrefined_rows_arrive(
        self, faulty: FaultyRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scheduler_module, "PRIORITY_SECONDS", 1e9)
        sizes: list[int] = []

        def slow(stage: str, inputs: Any) -> None:
            if stage == "refine":
                sizes.append(len(inputs["digit"]))
                time.sleep(1.5 * TICK_SECONDS * sizes[-1])

        faulty.before = slow
        scheduler = make_scheduler(faulty)
        rows = [Row(InferenceJob(complete_row(faulty, i), 0, i, RefinementLimits(steps=20)), monotonic()) for i in range(4)]
        scheduler.add(rows)
        scheduler.step()
        assert sizes == [4]  # no unrefined row has arrived
        scheduler.add([Row(InferenceJob(complete_row(faulty, 9), 0, 0), monotonic())])
        for _ in range(8):
            scheduler.step()
        assert sizes == [4] + [1] * 8

    def test_quick_steps_grow_while_unrefined_rows_arrive(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        step = runtime.step

        def recorded(held: Any, slots: Any) -> Any:
            sizes.append(len(slots))
            return step(held, slots)

        monkeypatch.setattr(runtime, "step", recorded)
        monkeypatch.setattr(scheduler_module, "TICK_SECONDS", 1e9)
        monkeypatch.setattr(scheduler_module, "PRIORITY_SECONDS", 1e9)
        scheduler = make_scheduler(runtime)
        words = [{"word": complete_row(runtime, i)["word"]} for i in range(8)]
        scheduler.add([Row(InferenceJob(word, 0, i, RefinementLimits(steps=6)), monotonic()) for i, word in enumerate(words)])
        while scheduler.active:
            scheduler.add([Row(InferenceJob(words[0], 0, 0), monotonic())])
            scheduler.step()
        assert sizes[:4] == [1, 2, 4, 8]

    @pytest.mark.parametrize("output", ["posterior", "log_var", "objective", "all"])
    @pytest.mark.parametrize("after_steps", [0, 2])
    def test_divergence_returns_the_best_posterior(self, faulty: FaultyRuntime, output: str, after_steps: int) -> None:
        runs = 0

        def spoil(stage: str, _: Any, outputs: Any) -> Any:
            nonlocal runs
            if stage != "refine":
                return outputs
            posterior, objective = outputs
            runs += 1
            if runs > after_steps and len(objective) == 2:  # the first row has not left yet
                posterior, objective = posterior.copy(), objective.copy()
                if output in ("posterior", "all"):
                    posterior[0, 0] = np.nan
                if output in ("log_var", "all"):
                    posterior[0, -1] = np.inf
                if output in ("objective", "all"):
                    objective[0] = np.nan
            return posterior, objective

        row = complete_row(faulty, 0)
        expected = run(make_scheduler(faulty), [InferenceJob(row, 0, 0, RefinementLimits(steps)) for steps in (0, 1, 2)])
        faulty.after = spoil
        jobs = [
            InferenceJob(row, 0, 0, RefinementLimits(9, trace=True), targets=("word",)),
            InferenceJob(complete_row(faulty, 1), 0, 1, RefinementLimits(9)),
        ]
        diverged, other = run(make_scheduler(faulty), jobs)
        refinement = diverged.refinement
        assert refinement.stopped == "diverged"
        assert refinement.after >= refinement.before
        numbers = (refinement.before, refinement.after, refinement.trace, diverged.mean)
        assert all(np.isfinite(number).all() for number in numbers)
        if after_steps == 0:
            np.testing.assert_allclose(diverged.mean, expected[0].mean, atol=1e-6)
        else:
            np.testing.assert_allclose(refinement.after, expected[refinement.steps].refinement.after, rtol=1e-5)
        assert (other.refinement.steps, other.refinement.stopped) == (9, "steps")


class TestSlots:
    """Rows come, step, finish, are abandoned and fail in any order: no slot leaks, and results are those of the serial path."""

    CAPACITY = 6

    @staticmethod
    def serial(runtime: Runtime, job: InferenceJob) -> tuple[np.ndarray, float]:
        """Return the refined mean and its objective, computed one row and one step at a time, without the scheduler."""
        inputs, present = collate(runtime.modalities, [job.row])
        start = q = runtime.encode(inputs, present)
        zeros = np.zeros_like(start.mean)
        anchor = Posterior(zeros, zeros) if present.all() else start
        count = runtime.noise_samples
        eps = antithetic(noise(job.seed, job.index, Stream.REFINE, (count + 1) // 2, runtime.latent), count)[None]
        best, highest = q, -np.inf
        for _ in range(job.refine.steps + 1):
            following, (objective,) = runtime.refine(inputs, present, q, anchor, eps)
            if objective > highest:
                best, highest = q, float(objective)
            q = following
        return best.mean[0], highest

    def test_rows_in_any_order_leak_no_slot_and_equal_the_serial_path(self, faulty: FaultyRuntime) -> None:
        serial: dict[int, tuple[np.ndarray, float]] = {}
        jobs = []
        for index in range(12):
            row = complete_row(faulty, index)
            names = ("word",) if index % 3 else ("word", "digit")
            jobs.append(InferenceJob({name: row[name] for name in names}, index, index, RefinementLimits(1 + index % 3)))
        operations = st.lists(
            st.tuples(st.sampled_from(["add", "add", "step", "step", "abandon", "poison", "memory"]), st.integers(0, 11)),
            max_size=20,
        )

        @settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
        @given(operations)
        def run(operations: list[tuple[str, int]]) -> None:
            scheduler = Scheduler(faulty, max_batch=3, observer=NullObserver(), max_rows=self.CAPACITY)
            table, poisoned, short_of_memory = scheduler._table, set[bytes](), [False]

            def fail(stage: str, inputs: Any) -> None:
                if stage == "refine":
                    if short_of_memory[0] and len(inputs["word"]) > 1:
                        raise RuntimeError("Failed to allocate memory")
                    if any(word.tobytes() in poisoned for word in inputs["word"]):
                        raise RuntimeError("poison")

            def check() -> None:
                held = [row.slot for row in scheduler._active if row.slot is not None]
                assert len(set(held)) == len(held), "two rows in one slot"
                assert table.free + len(held) == self.CAPACITY, "a slot leaked"

            faulty.before = fail
            rows: list[Row] = []
            for operation, number in operations:
                if operation == "add" and scheduler.active < self.CAPACITY:
                    rows.append(Row(jobs[number], monotonic()))
                    scheduler.add(rows[-1:])
                elif operation == "step":
                    scheduler.step()
                elif operation == "abandon" and rows:
                    rows[number % len(rows)].abandoned = True
                elif operation == "poison":
                    poisoned.add(jobs[number].row["word"].tobytes())
                elif operation == "memory":
                    short_of_memory[0] = not short_of_memory[0]
                check()
            while scheduler.active:
                scheduler.step()
                check()
            assert table.free == self.CAPACITY
            faulty.before = None
            for row in rows:
                index = row.job.index
                if isinstance(row.result, InferenceResult):
                    if index not in serial:
                        serial[index] = self.serial(faulty, row.job)
                    np.testing.assert_allclose(row.result.mean, serial[index][0], rtol=1e-4, atol=1e-4)
                    np.testing.assert_allclose(row.result.refinement.after, serial[index][1], rtol=1e-5)
                else:
                    assert row.abandoned or str(row.result) == "poison"

        run()


class TestFaults:
    @staticmethod
    def poison(runtime: Runtime, stage: str) -> tuple[InferenceJob, Callable[[str, Any], None]]:
        """Return a job, and a function that raises when a batch of the stage holds its row."""
        row = complete_row(runtime, 99)
        job = InferenceJob(row, 0, 0, RefinementLimits(2), targets=("digit",), latent="mean")

        def fail(at: str, inputs: Any) -> None:
            if at == stage and (inputs["digit"] == row["digit"]).all(axis=(1, 2, 3)).any():
                raise RuntimeError("poison")

        return job, fail

    @pytest.mark.parametrize("stage", ["encode", "refine"])
    def test_graph_error_fails_its_row_only(self, faulty: FaultyRuntime, stage: str) -> None:
        valid = mixed_jobs(faulty)
        expected = run(make_scheduler(faulty), valid)
        poisoned, faulty.before = self.poison(faulty, stage)
        *before, failed, last = run(make_scheduler(faulty), [*valid[:-1], poisoned, valid[-1]])
        assert isinstance(failed, RuntimeError)
        assert str(failed) == "poison"
        for result, other in zip([*before, last], expected, strict=True):
            assert_same(result, other)

    def test_device_lost_during_a_step_is_not_run_in_parts(self, faulty: FaultyRuntime) -> None:
        scheduler, stages = make_scheduler(faulty), list[str]()
        limits = RefinementLimits(steps=2)
        scheduler.add(
            [Row(InferenceJob({"word": complete_row(faulty, i)["word"]}, 0, i, limits), monotonic()) for i in range(4)]
        )

        def lose(stage: str, _: Any) -> None:
            stages.append(stage)
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x")

        faulty.before = lose
        with pytest.raises(DeviceLostError, match="cpu is lost for this process: CUDA failure 700"):
            scheduler.step()
        assert stages == ["refine", "encode"], "the batch, and one blank row"

    @pytest.mark.parametrize("stage", ["encode", "decode"])
    def test_non_finite_output_fails_its_row_only(self, faulty: FaultyRuntime, stage: str) -> None:
        jobs = [InferenceJob(complete_row(faulty, i), 0, i, targets=("digit",), latent="mean") for i in range(5)]
        expected = run(make_scheduler(faulty), jobs)

        def spoil(at: str, inputs: Any, outputs: Any) -> Any:
            if at != stage:
                return outputs
            if at == "encode":
                spoiled = (inputs["digit"] == jobs[3].row["digit"]).all(axis=(1, 2, 3))
                return Posterior(np.where(spoiled[:, None], np.float32(np.nan), outputs.mean), outputs.log_var)
            spoiled = np.isclose(inputs, expected[3].mean, rtol=0, atol=1e-6).all(axis=1)
            return np.where(spoiled[:, None, None, None], np.float32(np.nan), outputs)

        faulty.after = spoil
        results = run(make_scheduler(faulty), jobs)
        assert isinstance(results[3], FloatingPointError)
        for index in (0, 1, 2, 4):
            assert_same(results[index], expected[index])

    def test_batch_that_does_not_fit_into_memory_runs_in_parts(self, faulty: FaultyRuntime) -> None:
        jobs = mixed_jobs(faulty)
        expected = run(make_scheduler(faulty), jobs)

        def fail(stage: str, inputs: Any) -> None:
            size = len(inputs["digit"]) if stage in ("encode", "refine") else len(inputs)
            if size > 6:
                raise RuntimeError("Failed to allocate memory")

        faulty.before = fail
        for result, other in zip(run(make_scheduler(faulty), jobs), expected, strict=True):
            assert_same(result, other)

    def test_no_graph_runs_more_rows_than_max_batch(self, faulty: FaultyRuntime) -> None:
        """Not even where one item requests many samples."""
        job = InferenceJob(complete_row(faulty, 0), 0, 0, targets=("digit",), num_samples=20)
        (expected,) = run(make_scheduler(faulty), [job])
        sizes: dict[str, list[int]] = {"encode": [], "sample": [], "decode": []}
        faulty.before = lambda stage, inputs: sizes[stage].append(len(inputs["digit"] if stage == "encode" else inputs))
        (result,) = run(make_scheduler(faulty, max_batch=8), [job])
        assert sizes == {"encode": [1], "sample": [8, 8, 4], "decode": [8, 8, 4]}
        assert_same(result, expected)

    def test_abandoned_rows_are_not_run(self, runtime: Runtime) -> None:
        recorder = Recorder()
        scheduler = make_scheduler(runtime, recorder)
        rows = [Row(InferenceJob(complete_row(runtime, i), 0, i, RefinementLimits(steps=50)), monotonic()) for i in range(3)]
        rows[0].abandoned = True
        scheduler.add(rows)
        assert (recorder.batches, scheduler.active) == ([2], 2)
        rows[1].abandoned = True
        scheduler.step()
        assert scheduler.active == 1
        rows[2].abandoned = True
        scheduler.step()
        assert scheduler.active == 0
        assert recorder.stages == ["encode", "refine"]

    def test_step_without_rows_runs_no_graph(self, runtime: Runtime) -> None:
        recorder = Recorder()
        scheduler = make_scheduler(runtime, recorder)
        assert (scheduler.add([]), scheduler.step()) == ([], [])
        assert recorder.stages == []


def test_observer_and_row_get_every_stage(runtime: Runtime) -> None:
    recorder = Recorder()
    jobs = [
        InferenceJob(complete_row(runtime, i), 0, i, RefinementLimits(steps=2 * (i > 0)), targets=("digit",)) for i in range(3)
    ]
    results = run(make_scheduler(runtime, recorder), jobs)
    assert recorder.batches == [3]
    assert len(recorder.waits) == 3
    assert recorder.stages[:2] == ["encode", "generate"]
    assert recorder.stages[-1] == "generate"
    assert recorder.stages.count("refine") in range(3, 7)  # two rows, three evaluations each, in one batch or in turns
    refinements = [result.refinement for result in results if result.refinement is not None]
    assert recorder.refinements == [(r.steps, r.after - r.before, r.stopped) for r in refinements]
    assert len(refinements) == 2
    for result in results:
        assert result.stage_seconds.keys() == {"queue", "features", "encode", "refine", "generate"}
        assert (result.stage_seconds["refine"] > 0) == (result.refinement is not None)
        assert result.stage_seconds["encode"] > 0
        assert result.stage_seconds["generate"] > 0
