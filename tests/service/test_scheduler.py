"""Rows are batched without touching each other: not their numbers, not their waiting time, not their faults."""

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from time import monotonic
from typing import Any

import numpy as np
import pytest

from model import bundle
from model.modality import TextModality, collate
from model.runtime import Posterior, Runtime
from service.refinement import Stream, antithetic, noise
from service.scheduler import TICK_SECONDS, Row, Scheduler, Silent
from service.work import Outcome, Refine, Refinement, Work


class Recorder(Silent):
    """Keeps what the scheduler tells."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.stages: list[str] = []
        self.waits: list[float] = []
        self.refinements: list[Refinement] = []

    def batch(self, size: int) -> None:
        self.batches.append(size)

    def stage(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(name)

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def refined(self, refinement: Refinement) -> None:
        self.refinements.append(refinement)


class Sabotaged(Runtime):
    """The real graphs, with a fault in front of or behind them."""

    before: Callable[[str, Any], None] | None = None
    after: Callable[[str, Any, Any], Any] | None = None

    def encode(self, inputs: Any, present: Any) -> Posterior:
        self._trip("encode", inputs)
        answer = super().encode(inputs, present)
        return self.after("encode", inputs, answer) if self.after else answer

    def refine(self, inputs: Any, present: Any, posterior: Any, anchor: Any, noise: Any) -> Any:
        self._trip("refine", inputs)
        answer = super().refine(inputs, present, posterior, anchor, noise)
        return self.after("refine", inputs, answer) if self.after else answer

    def draw(self, posterior: Any, noise: Any) -> Any:
        self._trip("draw", noise)
        answer = super().draw(posterior, noise)
        return self.after("draw", noise, answer) if self.after else answer

    def decode(self, modality: str, z: Any) -> Any:
        self._trip("decode", z)
        answer = super().decode(modality, z)
        return self.after("decode", z, answer) if self.after else answer

    def _trip(self, stage: str, given: Any) -> None:
        if self.before:
            self.before(stage, given)


@pytest.fixture
def sabotaged() -> Sabotaged:
    return Sabotaged(bundle.read(bundle.builtin("digits")), threads=1)


def full_row(runtime: Runtime, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        m.name: generator.integers(0, len(m.alphabet), m.shape)
        if isinstance(m, TextModality)
        else generator.random(m.shape, dtype=np.float32)
        for m in runtime.modalities
    }


def mixed_works(runtime: Runtime) -> list[Work]:
    """Every subset, with and without refinement and generation, seeds and positions all different."""
    names = [m.name for m in runtime.modalities]
    subsets = [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]
    works = []
    for index, subset in enumerate(subsets * 2):
        row = full_row(runtime, index)
        works.append(
            Work(
                row={name: row[name] for name in subset},
                seed=index % 3,
                index=index,
                refine=Refine(steps=index % 4),
                sample_embedding=index % 2 == 0,
                targets=tuple(names[: index % (len(names) + 1)]),
                num_samples=1 + index % 3,
                latent="mean" if index % 5 == 0 else "sample",
                temperature=0.5 + index % 2,
            )
        )
    return works


def run(scheduler: Scheduler, works: Sequence[Work]) -> list[Any]:
    rows = [Row(work, monotonic()) for work in works]
    scheduler.admit(rows)
    while scheduler.active:
        scheduler.step()
    return [row.outcome for row in rows]


def scheduler_of(runtime: Runtime, observer: Silent | None = None, max_batch: int = 64) -> Scheduler:
    return Scheduler(runtime, max_batch=max_batch, observer=observer or Silent())


def assert_same(one: Outcome, other: Outcome, tolerance: float = 1e-5) -> None:
    def close(a: Any, b: Any) -> None:
        if a is not None or b is not None:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    close(one.mean, other.mean)
    close(one.log_var, other.log_var)
    close(one.sample, other.sample)
    assert one.generated.keys() == other.generated.keys()
    for name, values in one.generated.items():
        close(values, other.generated[name])
    assert (one.refinement is None) == (other.refinement is None)
    if one.refinement and other.refinement:
        assert (one.refinement.steps, one.refinement.stopped) == (other.refinement.steps, other.refinement.stopped)
        close(one.refinement.after, other.refinement.after)


class TestAnswers:
    def test_neighbours_and_batch_size_change_nothing(self, runtime: Runtime) -> None:
        works = mixed_works(runtime)
        alone = [run(scheduler_of(runtime), [work])[0] for work in works]
        for max_batch in (64, 3):
            for one, other in zip(alone, run(scheduler_of(runtime, max_batch=max_batch), works), strict=True):
                assert_same(one, other)

    def test_the_same_work_has_the_same_answer(self, runtime: Runtime) -> None:
        works = mixed_works(runtime)
        for one, other in zip(run(scheduler_of(runtime), works), run(scheduler_of(runtime), works), strict=True):
            assert_same(one, other, tolerance=0)

    def test_another_seed_or_position_samples_another_z(self, runtime: Runtime) -> None:
        row = full_row(runtime, 0)
        keys = [(0, 0), (1, 0), (0, 1)]
        outcomes = run(
            scheduler_of(runtime),
            [Work(row, seed, index, sample_embedding=True, targets=("digit",), num_samples=2) for seed, index in keys],
        )
        assert len({outcome.sample.tobytes() for outcome in outcomes}) == 3
        assert len({sample.tobytes() for outcome in outcomes for sample in outcome.generated["digit"]}) == 6
        assert len({outcome.mean.tobytes() for outcome in outcomes}) == 1

    def test_without_steps_it_is_the_encoder_alone(self, runtime: Runtime) -> None:
        works = [Work(work.row, 0, index) for index, work in enumerate(mixed_works(runtime))]
        posterior = runtime.encode(*collate(runtime.modalities, [work.row for work in works]))
        for index, outcome in enumerate(run(scheduler_of(runtime), works)):
            np.testing.assert_array_equal(outcome.mean, posterior.mean[index])
            np.testing.assert_array_equal(outcome.log_var, posterior.log_var[index])
            assert (outcome.refinement, outcome.sample, outcome.generated) == (None, None, {})

    def test_what_is_decoded_is_the_sample(self, runtime: Runtime) -> None:
        row = full_row(runtime, 0)
        for latent, temperature in (("mean", 1.0), ("sample", 0.0), ("sample", 0.7)):
            (outcome,) = run(
                scheduler_of(runtime, max_batch=2),
                [Work(row, 5, 3, targets=("photo", "word"), num_samples=5, latent=latent, temperature=temperature)],
            )
            posterior = Posterior(*(np.repeat(part[None], 5, axis=0) for part in (outcome.mean, outcome.log_var)))
            apart = runtime.draw(posterior, noise(5, 3, Stream.GENERATE, 5, runtime.latent)) - outcome.mean
            z = outcome.mean + (temperature if latent == "sample" else 0) * apart
            assert outcome.generated.keys() == {"photo", "word"}
            for name, values in outcome.generated.items():
                np.testing.assert_allclose(values, runtime.decode(name, z.astype(np.float32)), rtol=1e-4, atol=1e-5)

    def test_the_sampled_embedding_ignores_the_temperature(self, runtime: Runtime) -> None:
        work = Work(full_row(runtime, 0), 5, 3, sample_embedding=True, temperature=0.0)
        (outcome,) = run(scheduler_of(runtime), [work])
        eps = noise(5, 3, Stream.EMBED, 1, runtime.latent)[0]
        drawn = runtime.draw(Posterior(outcome.mean[None], outcome.log_var[None]), eps[None])[0]
        np.testing.assert_allclose(outcome.sample, drawn, rtol=1e-4, atol=1e-5)

    def test_samples_that_are_no_numbers_fail_their_row_alone(self, sabotaged: Sabotaged, runtime: Runtime) -> None:
        works = [Work(full_row(runtime, i), 9, i, sample_embedding=True, targets=("word",)) for i in range(3)]
        worst = noise(9, 1, Stream.EMBED, 1, runtime.latent)[0]

        def spoil(stage: str, given: Any, answer: Any) -> Any:
            return np.where((given == worst).all(axis=1)[:, None], np.nan, answer) if stage == "draw" else answer

        sabotaged.after = spoil
        one, broken, other = run(scheduler_of(sabotaged), works)
        assert isinstance(broken, FloatingPointError)
        for index, outcome in ((0, one), (2, other)):
            assert_same(outcome, run(scheduler_of(runtime), [works[index]])[0])


class TestRefinement:
    @pytest.mark.parametrize("steps", [1, 2, 5, 20])
    def test_it_never_ends_below_its_start_and_tells_the_truth(self, runtime: Runtime, steps: int) -> None:
        """The objective of the answer, evaluated again from outside, is ``after``."""
        works = [Work(work.row, work.seed, work.index, Refine(steps, trace=True)) for work in mixed_works(runtime)]
        for work, outcome in zip(works, run(scheduler_of(runtime), works), strict=True):
            result = outcome.refinement
            assert (result.steps, len(result.trace), result.stopped) == (steps, steps + 1, "steps")
            assert result.before == result.trace[0]
            assert result.after == max(result.trace) >= result.before
            complete = len(work.row) == len(runtime.modalities)
            assert result.objective == ("elbo" if complete else "observed")
            inputs, present = collate(runtime.modalities, [work.row])
            start = runtime.encode(inputs, present)
            zeros = np.zeros((1, runtime.latent), np.float32)
            anchor = Posterior(zeros, zeros) if complete else start
            eps = antithetic(
                noise(work.seed, work.index, Stream.REFINE, (runtime.samples + 1) // 2, runtime.latent), runtime.samples
            )
            for posterior, expected in (
                (start, result.before),
                (Posterior(outcome.mean[None], outcome.log_var[None]), result.after),
            ):
                _, objective = runtime.refine(inputs, present, posterior, anchor, eps[None])
                np.testing.assert_allclose(objective[0], expected, rtol=1e-5)

    def test_generation_starts_from_the_refined_posterior(self, runtime: Runtime) -> None:
        work = Work({"word": full_row(runtime, 0)["word"]}, 0, 0, Refine(5), targets=("digit",), latent="mean")
        (outcome,) = run(scheduler_of(runtime), [work])
        np.testing.assert_allclose(outcome.generated["digit"], runtime.decode("digit", outcome.mean[None]), atol=1e-5)

    def test_tolerance_and_budget_end_it(self, runtime: Runtime) -> None:
        row = full_row(runtime, 0)
        asked = [Refine(50, tolerance=1e9), Refine(50, budget_ms=0.0), Refine(2, tolerance=-1e9, budget_ms=1e9)]
        outcomes = run(scheduler_of(runtime), [Work(row, 0, i, refine) for i, refine in enumerate(asked)])
        assert [(o.refinement.steps, o.refinement.stopped) for o in outcomes] == [(1, "tolerance"), (0, "budget"), (2, "steps")]
        assert [o.refinement.trace for o in outcomes] == [None] * 3

    def test_each_row_gets_its_turn(self, runtime: Runtime) -> None:
        """Seven rows, two at a time: nobody is two steps ahead of another."""
        scheduler = scheduler_of(runtime, max_batch=2)
        rows = [Row(Work(full_row(runtime, i), 0, i, Refine(steps=3, trace=True)), monotonic()) for i in range(7)]
        for start in range(0, 7, 2):
            scheduler.admit(rows[start : start + 2])
        finished: list[int] = []
        while scheduler.active:
            finished += [rows.index(row) for row in scheduler.step()]
        assert finished == list(range(7))

    def test_a_long_refinement_does_not_hold_back_a_short_row(self, runtime: Runtime) -> None:
        scheduler = scheduler_of(runtime)
        long = Row(Work(full_row(runtime, 0), 0, 0, Refine(steps=50)), monotonic())
        short = Row(Work(full_row(runtime, 1), 0, 0), monotonic())
        brief = Row(Work(full_row(runtime, 2), 0, 0, Refine(steps=1)), monotonic())
        assert scheduler.admit([long]) == []
        scheduler.step()
        assert scheduler.admit([short, brief]) == [short]
        done = [row for _ in range(4) for row in scheduler.step()]  # together, or in turns where that takes too long
        assert done == [brief]
        assert (scheduler.active, long.outcome) == (1, None)

    def test_rows_of_one_subset_step_together(self, sabotaged: Sabotaged) -> None:
        """So that no decoder runs for a modality that none of them has; and every subset gets its turn."""
        subsets: list[set[bytes]] = []
        refine = sabotaged.refine

        def watched(inputs: Any, present: Any, *others: Any) -> Any:
            subsets.append({row.tobytes() for row in present})
            return refine(inputs, present, *others)

        sabotaged.refine = watched  # type: ignore[method-assign]
        works = [Work(work.row, 0, index, Refine(2)) for index, work in enumerate(mixed_works(sabotaged))]
        run(scheduler_of(sabotaged), works)
        assert [len(found) for found in subsets] == [1] * 21  # three evaluations of each of seven subsets
        assert all(len(set().union(*subsets[turn : turn + 7])) == 7 for turn in (0, 7, 14))

    def test_steps_are_short_while_others_wait_for_their_end(self, sabotaged: Sabotaged) -> None:
        turns: list[int] = []

        def slow(stage: str, inputs: Any) -> None:
            if stage == "refine":
                turns.append(len(inputs["digit"]))
                time.sleep(1.5 * TICK_SECONDS * turns[-1])

        sabotaged.before = slow
        scheduler = scheduler_of(sabotaged)
        rows = [Row(Work(full_row(sabotaged, i), 0, i, Refine(steps=20)), monotonic()) for i in range(4)]
        scheduler.admit(rows)
        scheduler.step()
        assert turns == [4]  # nobody else is there
        scheduler.admit([Row(Work(full_row(sabotaged, 9), 0, 0), monotonic())])
        for _ in range(8):
            scheduler.step()
        assert turns == [4] + [1] * 8

    def test_quick_steps_grow_while_others_wait(self, runtime: Runtime) -> None:
        turns: list[int] = []
        refine = runtime.refine

        def counted(inputs: Any, present: Any, *others: Any) -> Any:
            turns.append(len(present))
            return refine(inputs, present, *others)

        scheduler = scheduler_of(runtime)
        words = [{"word": full_row(runtime, i)["word"]} for i in range(8)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "refine", counted)
            patch.setattr("service.scheduler.TICK_SECONDS", 10.0)
            scheduler.admit([Row(Work(word, 0, i, Refine(steps=6)), monotonic()) for i, word in enumerate(words)])
            while scheduler.active:
                scheduler.admit([Row(Work(words[0], 0, 0), monotonic())])
                scheduler.step()
        assert turns[:4] == [1, 2, 4, 8]

    @pytest.mark.parametrize("what", ["posterior", "log_var", "objective", "everything"])
    @pytest.mark.parametrize("since", [0, 2])
    def test_divergence_falls_back_to_the_best(self, sabotaged: Sabotaged, what: str, since: int) -> None:
        calls = 0

        def spoil(stage: str, inputs: Any, answer: Any) -> Any:  # noqa: ARG001
            nonlocal calls
            if stage != "refine":
                return answer
            posterior, objective = answer
            calls += 1
            if calls > since and len(objective) == 2:  # the row has not left yet
                mean, log_var, objective = posterior.mean.copy(), posterior.log_var.copy(), objective.copy()
                if what in ("posterior", "everything"):
                    mean[0, 0] = np.nan
                if what in ("log_var", "everything"):
                    log_var[0, -1] = np.inf
                if what in ("objective", "everything"):
                    objective[0] = np.nan
                posterior = Posterior(mean, log_var)
            return posterior, objective

        row = full_row(sabotaged, 0)
        calm = run(scheduler_of(sabotaged), [Work(row, 0, 0, Refine(steps)) for steps in (0, 1, 2)])
        sabotaged.after = spoil
        works = [Work(row, 0, 0, Refine(9, trace=True), targets=("word",)), Work(full_row(sabotaged, 1), 0, 1, Refine(9))]
        diverged, neighbour = run(scheduler_of(sabotaged), works)
        result = diverged.refinement
        assert result.stopped == "diverged"
        assert result.after >= result.before
        assert all(np.isfinite(numbers).all() for numbers in (result.before, result.after, result.trace, diverged.mean))
        if since == 0:
            np.testing.assert_allclose(diverged.mean, calm[0].mean, atol=1e-6)
        else:
            np.testing.assert_allclose(result.after, calm[result.steps].refinement.after, rtol=1e-5)
        assert (neighbour.refinement.steps, neighbour.refinement.stopped) == (9, "steps")


class TestFaults:
    @staticmethod
    def poison(runtime: Runtime, stage: str) -> tuple[Work, Callable[[str, Any], None]]:
        """A work, and what raises whenever a batch of the stage holds its row."""
        row = full_row(runtime, 99)
        work = Work(row, 0, 0, Refine(2), targets=("digit",), latent="mean")
        mark = row["digit"]

        def trip(at: str, given: Any) -> None:
            if at == stage and (given["digit"] == mark).all(axis=(1, 2, 3)).any():
                raise RuntimeError("poison")

        return work, trip

    @pytest.mark.parametrize("stage", ["encode", "refine"])
    def test_a_fault_stays_with_its_row(self, sabotaged: Sabotaged, stage: str) -> None:
        innocent = mixed_works(sabotaged)
        expected = run(scheduler_of(sabotaged), innocent)
        guilty, sabotaged.before = self.poison(sabotaged, stage)
        *before, failed, last = run(scheduler_of(sabotaged), [*innocent[:-1], guilty, innocent[-1]])
        assert isinstance(failed, RuntimeError)
        assert str(failed) == "poison"
        for one, other in zip(expected, [*before, last], strict=True):
            assert_same(one, other)

    @pytest.mark.parametrize("stage", ["encode", "decode"])
    def test_numbers_that_are_not_finite_stay_with_their_row(self, sabotaged: Sabotaged, stage: str) -> None:
        works = [Work(full_row(sabotaged, i), 0, i, targets=("digit",), latent="mean") for i in range(5)]
        expected = run(scheduler_of(sabotaged), works)

        def spoil(at: str, given: Any, answer: Any) -> Any:
            if at != stage:
                return answer
            if at == "encode":
                bad = (given["digit"] == works[3].row["digit"]).all(axis=(1, 2, 3))
                return Posterior(np.where(bad[:, None], np.float32(np.nan), answer.mean), answer.log_var)
            bad = np.isclose(given, expected[3].mean, rtol=0, atol=1e-6).all(axis=1)
            return np.where(bad[:, None, None, None], np.float32(np.nan), answer)

        sabotaged.after = spoil
        outcomes = run(scheduler_of(sabotaged), works)
        assert isinstance(outcomes[3], FloatingPointError)
        for index in (0, 1, 2, 4):
            assert_same(outcomes[index], expected[index])

    def test_a_batch_that_is_too_large_runs_in_parts(self, sabotaged: Sabotaged) -> None:
        works = mixed_works(sabotaged)
        expected = run(scheduler_of(sabotaged), works)

        def trip(stage: str, given: Any) -> None:
            size = len(given["digit"]) if stage in ("encode", "refine") else len(given)
            if size > 6:
                raise RuntimeError("Failed to allocate memory")

        sabotaged.before = trip
        for one, other in zip(expected, run(scheduler_of(sabotaged), works), strict=True):
            assert_same(one, other)

    def test_abandoned_rows_are_not_run(self, runtime: Runtime) -> None:
        recorder = Recorder()
        scheduler = scheduler_of(runtime, recorder)
        rows = [Row(Work(full_row(runtime, i), 0, i, Refine(steps=50)), monotonic()) for i in range(3)]
        rows[0].abandoned = True
        scheduler.admit(rows)
        assert (recorder.batches, scheduler.active) == ([2], 2)
        rows[1].abandoned = True
        scheduler.step()
        assert scheduler.active == 1
        rows[2].abandoned = True
        scheduler.step()
        assert scheduler.active == 0
        assert recorder.stages == ["encode", "refine"]

    def test_no_rows_run_nothing(self, runtime: Runtime) -> None:
        recorder = Recorder()
        scheduler = scheduler_of(runtime, recorder)
        assert (scheduler.admit([]), scheduler.step()) == ([], [])
        assert recorder.stages == []


def test_the_observer_and_the_row_hear_of_every_stage(runtime: Runtime) -> None:
    recorder = Recorder()
    works = [Work(full_row(runtime, i), 0, i, Refine(steps=2 * (i > 0)), targets=("digit",)) for i in range(3)]
    outcomes = run(scheduler_of(runtime, recorder), works)
    assert recorder.batches == [3]
    assert len(recorder.waits) == 3
    assert recorder.stages[:2] == ["encode", "generate"]
    assert recorder.stages[-1] == "generate"
    assert recorder.stages.count("refine") in range(3, 7)  # two rows, three evaluations each, together or in turns
    assert recorder.refinements == [outcome.refinement for outcome in outcomes[1:]]
    for outcome in outcomes:
        assert outcome.timings.keys() == {"queue", "encode", "refine", "generate"}
        assert (outcome.timings["refine"] > 0) == (outcome.refinement is not None)
        assert outcome.timings["encode"] > 0
        assert outcome.timings["generate"] > 0
