"""The noise of a row, and one row's way up: what is kept, and when it ends."""

import numpy as np
import pytest

from service.refinement import Ascent, Stream, antithetic, noise
from service.work import Refine


def posterior(value: float) -> tuple[np.ndarray, np.ndarray]:
    return np.full(4, value, np.float32), np.full(4, value, np.float32)


def climb(refine: Refine, objectives: list[float], *, finite: bool = True, tick: float = 0.0) -> tuple[Ascent, int]:
    """Feed objectives until the ascent ends; the k-th posterior holds the number k. Returns it and the evaluations it took."""
    ascent = Ascent(refine, *posterior(0), complete=False, noise=np.zeros((2, 4), np.float32), now=0.0)
    for count, objective in enumerate(objectives, start=1):
        if not ascent.advance(float(objective), *posterior(count), finite=finite, now=count * tick):
            return ascent, count
    raise AssertionError("still under way")


def test_steps_take_one_evaluation_more() -> None:
    ascent, evaluations = climb(Refine(steps=3, trace=True), [-9, -5, -4, -2, 0])
    assert evaluations == 4
    result = ascent.refinement()
    assert (result.steps, result.before, result.after, result.stopped) == (3, -9, -2, "steps")
    assert result.trace == [-9, -5, -4, -2]
    np.testing.assert_array_equal(ascent.best, posterior(3))


def test_the_best_is_kept_not_the_last() -> None:
    ascent, _ = climb(Refine(steps=3), [-9, -2, -4, -8])
    assert ascent.refinement().after == -2
    np.testing.assert_array_equal(ascent.best, posterior(1))


def test_a_start_that_only_gets_worse_is_returned() -> None:
    ascent, _ = climb(Refine(steps=2), [-1, -2, -3])
    result = ascent.refinement()
    assert (result.before, result.after, result.steps) == (-1, -1, 2)
    np.testing.assert_array_equal(ascent.best, posterior(0))


def test_a_small_gain_ends_it() -> None:
    ascent, _ = climb(Refine(steps=50, tolerance=1.0), [-9, -5, -3, -2.5, 0])
    result = ascent.refinement()
    assert (result.steps, result.after, result.stopped) == (3, -2.5, "tolerance")


def test_a_spent_budget_ends_it() -> None:
    ascent, _ = climb(Refine(steps=50, budget_ms=250.0), [-9, -5, -4, -2, 0], tick=0.1)
    result = ascent.refinement()
    assert (result.steps, result.after, result.stopped) == (2, -4, "budget")
    np.testing.assert_array_equal(ascent.best, posterior(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_objective_that_is_not_finite_ends_it_with_the_best_so_far(bad: float) -> None:
    ascent, _ = climb(Refine(steps=50, trace=True), [-9, -5, bad])
    result = ascent.refinement()
    assert (result.steps, result.after, result.stopped, result.trace) == (1, -5, "diverged", [-9, -5])
    np.testing.assert_array_equal(ascent.best, posterior(1))


def test_a_posterior_that_is_not_finite_ends_it_unseen() -> None:
    ascent, evaluations = climb(Refine(steps=50), [-9, -5], finite=False)
    assert evaluations == 1
    assert ascent.refinement().stopped == "diverged"
    np.testing.assert_array_equal(ascent.best, posterior(0))


def test_a_start_without_an_objective_is_returned_as_it_was() -> None:
    ascent, _ = climb(Refine(steps=50, trace=True), [np.nan])
    result = ascent.refinement()
    assert (result.steps, result.before, result.after, result.stopped, result.trace) == (0, 0, 0, "diverged", [])
    np.testing.assert_array_equal(ascent.best, posterior(0))


def test_the_anchor_is_the_prior_only_for_complete_rows() -> None:
    for complete, expected in ((True, posterior(0)), (False, posterior(5))):
        ascent = Ascent(Refine(1), *posterior(5), complete=complete, noise=np.zeros((2, 4), np.float32), now=0.0)
        np.testing.assert_array_equal(ascent.anchor, expected)


def test_it_has_no_result_before_its_end() -> None:
    ascent = Ascent(Refine(2), *posterior(0), complete=True, noise=np.zeros((2, 4), np.float32), now=0.0)
    with pytest.raises(RuntimeError, match="under way"):
        ascent.refinement()


def test_noise_depends_on_seed_index_and_stream_alone() -> None:
    keys = [(seed, index, stream) for seed in (0, 1, 2**63, 2**64 - 1) for index in (0, 1, 31) for stream in Stream]
    drawn = [noise(*key, 3, 8) for key in keys]
    for key, first in zip(keys, drawn, strict=True):
        np.testing.assert_array_equal(noise(*key, 3, 8), first)
    assert len({numbers.tobytes() for numbers in drawn}) == len(keys)


def test_more_samples_begin_like_fewer() -> None:
    np.testing.assert_array_equal(noise(7, 0, Stream.GENERATE, 5, 8)[:2], noise(7, 0, Stream.GENERATE, 2, 8))


def test_noise_is_standard_normal() -> None:
    numbers = noise(3, 4, Stream.EMBED, 1000, 32)
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (4, 2), (5, 2)])
def test_antithetic_noise_comes_in_pairs(count: int, pairs: int) -> None:
    drawn = antithetic(noise(0, 0, Stream.REFINE, (count + 1) // 2, 8), count)
    assert drawn.shape == (count, 8)
    for pair in range(pairs):
        np.testing.assert_array_equal(drawn[2 * pair], -drawn[2 * pair + 1])
