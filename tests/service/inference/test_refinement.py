"""The noise of a row, and the refinement of one row: what it keeps and when it stops."""

import numpy as np
import pytest

from concord.service.inference.jobs import RefinementLimits
from concord.service.inference.refinement import RefinementState, Stream, antithetic, noise


def posterior(value: float) -> np.ndarray:
    return np.full(8, value, np.float32)


def refine(
    limits: RefinementLimits, objectives: list[float], *, finite: bool = True, tick: float = 0.0
) -> tuple[RefinementState, int]:
    """Feed objectives until the refinement ends.

    The k-th posterior holds the number k. Evaluations are ``tick`` seconds apart.

    Returns:
        the state, and the number of evaluations.
    """
    state = RefinementState(limits, posterior(0), complete=False, now=0.0)
    for count, objective in enumerate(objectives, start=1):
        if not state.advance(float(objective), posterior(count), finite=finite, now=count * tick):
            return state, count
    raise AssertionError("the refinement has not ended")


def test_steps_take_one_more_evaluation() -> None:
    state, evaluations = refine(RefinementLimits(steps=3, trace=True), [-9, -5, -4, -2, 0])
    assert evaluations == 4
    result = state.result()
    assert (result.steps, result.before, result.after, result.stopped) == (3, -9, -2, "steps")
    assert result.trace == [-9, -5, -4, -2]
    np.testing.assert_array_equal(state.best, posterior(3))


def test_best_is_the_highest_objective_not_the_last() -> None:
    state, _ = refine(RefinementLimits(steps=3), [-9, -2, -4, -8])
    assert state.result().after == -2
    np.testing.assert_array_equal(state.best, posterior(1))


def test_best_is_the_start_if_no_step_gains() -> None:
    state, _ = refine(RefinementLimits(steps=2), [-1, -2, -3])
    result = state.result()
    assert (result.before, result.after, result.steps) == (-1, -1, 2)
    np.testing.assert_array_equal(state.best, posterior(0))


def test_gain_below_tolerance_stops() -> None:
    state, _ = refine(RefinementLimits(steps=50, tolerance=1.0), [-9, -5, -3, -2.5, 0])
    result = state.result()
    assert (result.steps, result.after, result.stopped) == (3, -2.5, "tolerance")


def test_spent_budget_stops() -> None:
    state, _ = refine(RefinementLimits(steps=50, budget_ms=250.0), [-9, -5, -4, -2, 0], tick=0.1)
    result = state.result()
    assert (result.steps, result.after, result.stopped) == (2, -4, "budget")
    np.testing.assert_array_equal(state.best, posterior(2))


@pytest.mark.parametrize("objective", [np.nan, np.inf, -np.inf])
def test_non_finite_objective_stops_with_the_best_before_it(objective: float) -> None:
    state, _ = refine(RefinementLimits(steps=50, trace=True), [-9, -5, objective])
    result = state.result()
    assert (result.steps, result.after, result.stopped, result.trace) == (1, -5, "diverged", [-9, -5])
    np.testing.assert_array_equal(state.best, posterior(1))


def test_non_finite_posterior_stops_and_is_never_evaluated() -> None:
    state, evaluations = refine(RefinementLimits(steps=50), [-9, -5], finite=False)
    assert evaluations == 1
    assert state.result().stopped == "diverged"
    np.testing.assert_array_equal(state.best, posterior(0))


def test_non_finite_objective_at_the_start_returns_the_start() -> None:
    state, _ = refine(RefinementLimits(steps=50, trace=True), [np.nan])
    result = state.result()
    assert (result.steps, result.before, result.after, result.stopped, result.trace) == (0, 0, 0, "diverged", [])
    np.testing.assert_array_equal(state.best, posterior(0))


def test_result_before_the_end_raises() -> None:
    state = RefinementState(RefinementLimits(2), posterior(0), complete=True, now=0.0)
    with pytest.raises(RuntimeError, match="not finished"):
        state.result()


def test_noise_depends_on_seed_index_and_stream_only() -> None:
    keys = [(seed, index, stream) for seed in (0, 1, 2**63, 2**64 - 1) for index in (0, 1, 31) for stream in Stream]
    samples = [noise(*key, 3, 8) for key in keys]
    for key, sample in zip(keys, samples, strict=True):
        np.testing.assert_array_equal(noise(*key, 3, 8), sample)
    assert len({sample.tobytes() for sample in samples}) == len(keys)


def test_noise_of_more_samples_starts_with_that_of_fewer() -> None:
    np.testing.assert_array_equal(noise(7, 0, Stream.GENERATE, 5, 8)[:2], noise(7, 0, Stream.GENERATE, 2, 8))


def test_noise_is_standard_normal() -> None:
    numbers = noise(3, 4, Stream.EMBED, 1000, 32)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (4, 2), (5, 2)])
def test_antithetic_noise_comes_in_pairs(count: int, pairs: int) -> None:
    numbers = antithetic(noise(0, 0, Stream.REFINE, (count + 1) // 2, 8), count)
    assert numbers.shape == (count, 8)
    for pair in range(pairs):
        np.testing.assert_array_equal(numbers[2 * pair], -numbers[2 * pair + 1])
