"""The inference thread, the queue in front of it and the futures behind it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from concord.model import bundle
from concord.model.modality import collate
from concord.model.runtime import Runtime
from concord.service.inference.engine import BEAT_SECONDS, Engine
from concord.service.inference.jobs import EngineFailed, InferenceJob, InferenceResult, QueueFull, RefinementLimits
from tests.support.runtimes import GatedRuntime
from tests.support.waiting import wait_for_async

POISON = np.full(8, 26, np.int64)
"""A word on which ``poison`` makes the encoder fail."""


@pytest.fixture(scope="module")
def digits() -> bundle.Bundle:
    return bundle.read(bundle.builtin("digits"))


@pytest.fixture
def gated(digits: bundle.Bundle) -> GatedRuntime:
    return GatedRuntime(digits, threads=1)


def poison(runtime: GatedRuntime, error: BaseException) -> None:
    """Make the encoder raise ``error`` on batches that hold the word ``POISON``."""

    def fail(inputs: Any, _: Any) -> None:
        if (inputs["word"] == POISON).all(axis=1).any():
            raise error

    runtime.before_encode = fail


def word_job(number: int, **options: Any) -> InferenceJob:
    """Return a job whose result differs from that of every other number."""
    letters = [number // 26**place % 26 + 1 for place in range(3)]
    return InferenceJob({"word": np.array([*letters, 0, 0, 0, 0, 0], np.int64)}, seed=0, index=0, **options)


def expected_means(runtime: Runtime, jobs: Sequence[InferenceJob]) -> np.ndarray:
    return np.concatenate([Runtime.encode(runtime, *collate(runtime.modalities, [job.row])).mean for job in jobs])


def means(results: Sequence[InferenceResult]) -> np.ndarray:
    return np.stack([result.mean for result in results])


@contextlib.asynccontextmanager
async def running_engine(runtime: GatedRuntime, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(runtime, **options)
    engine.start()
    try:
        yield engine
    finally:
        runtime.open()
        await asyncio.to_thread(engine.stop)


def run_async(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def block_inference(engine: Engine, runtime: GatedRuntime) -> "asyncio.Task[list[InferenceResult]]":
    """Hold the inference thread inside a run with one row."""
    runtime.close()
    task = asyncio.create_task(engine.submit([word_job(0)]))
    await asyncio.to_thread(runtime.wait_until_entered)
    return task


async def wait_for_beats(engine: Engine, count: int) -> None:
    """Wait for heartbeats: each of them lowers the age of the last one."""
    for _ in range(count):
        ages = [engine.heartbeat_age]

        def dropped(ages: list[float] = ages) -> bool:
            ages.append(engine.heartbeat_age)
            return ages[-1] < ages[-2]

        await wait_for_async(dropped, message="the inference thread does not beat")


def test_submit_concurrent_requests_each_get_their_results_in_order(gated: GatedRuntime) -> None:
    async def test() -> None:
        requests = [[word_job(10 * request + item) for item in range(1 + request % 4)] for request in range(60)]
        async with running_engine(gated) as engine:
            all_results = await asyncio.gather(*(engine.submit(jobs) for jobs in requests))
        for jobs, results in zip(requests, all_results, strict=True):
            np.testing.assert_allclose(means(results), expected_means(gated, jobs), atol=1e-5)

    run_async(test())


def test_waiting_jobs_run_together_up_to_max_batch(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated, max_batch=8) as engine:
            first = await block_inference(engine, gated)
            others = [asyncio.create_task(engine.submit([word_job(i), word_job(i + 1)])) for i in range(10)]
            await wait_for_async(lambda: engine.queue_depth == 20)
            gated.open()
            await asyncio.gather(first, *others)
            assert engine.queue_depth == 0
        assert gated.batches == [1, 8, 8, 4]

    run_async(test())


def test_submit_without_jobs_returns_at_once(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            assert await engine.submit([]) == []
        assert gated.batches == []

    run_async(test())


def test_submit_beyond_max_queue_items_rejects_the_complete_request(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated, max_queue_items=10) as engine:
            tasks = [await block_inference(engine, gated)]
            tasks.append(asyncio.create_task(engine.submit([word_job(i) for i in range(5)])))
            await wait_for_async(lambda: engine.queue_depth == 5)
            with pytest.raises(QueueFull, match="holds 6 items") as caught:
                await engine.submit([word_job(i) for i in range(5)])
            assert caught.value.waiting == 6
            assert caught.value.retry_after_ms > 0
            assert engine.queue_depth == 5
            tasks.append(asyncio.create_task(engine.submit([word_job(i) for i in range(4)])))
            await wait_for_async(lambda: engine.queue_depth == 9)
            with pytest.raises(QueueFull):
                await engine.submit([word_job(0)])
            gated.open()
            assert [len(results) for results in await asyncio.gather(*tasks)] == [1, 5, 4]
            assert len(await engine.submit([word_job(i) for i in range(10)])) == 10
            with pytest.raises(QueueFull):
                await engine.submit([word_job(i) for i in range(11)])

    run_async(test())


def test_submit_from_many_threads_never_overfills_the_queue(gated: GatedRuntime) -> None:
    """The capacity check and the reservation are one atomic step."""

    async def test() -> None:
        async with running_engine(gated, max_queue_items=50) as engine:
            first = await block_inference(engine, gated)
            accepted: list[int] = []

            async def submit(size: int) -> None:
                with contextlib.suppress(QueueFull):
                    accepted.append(len(await engine.submit([word_job(i) for i in range(size)])))

            async def submit_many() -> None:
                await asyncio.gather(*(submit(1 + number % 7) for number in range(40)))

            loops = [threading.Thread(target=asyncio.run, args=(submit_many(),)) for _ in range(8)]
            for loop in loops:
                loop.start()
            await wait_for_async(lambda: engine.queue_depth > 40)
            assert engine.queue_depth <= 49
            gated.open()
            await first
            await asyncio.to_thread(lambda: [loop.join() for loop in loops])
            assert engine.queue_depth == 0
            assert sum(accepted) > 40

    run_async(test())


def test_submit_with_an_expected_wait_above_max_wait_is_rejected(gated: GatedRuntime) -> None:
    """The wait follows from the runs of the jobs ahead, not from their number: a row under refinement runs many times."""
    gated.before_encode = lambda _, present: time.sleep(0.01 * len(present))

    async def test() -> None:
        async with running_engine(gated, max_wait=0.5) as engine:
            await engine.submit([word_job(i) for i in range(200)])  # an idle engine accepts any request, and learns its pace
            for ahead in ([word_job(i) for i in range(100)], [word_job(0, refine=RefinementLimits(100))]):
                tasks = [await block_inference(engine, gated), asyncio.create_task(engine.submit(ahead))]
                await wait_for_async(lambda ahead=ahead: engine.queue_depth == len(ahead))
                with pytest.raises(QueueFull, match=f"holds {1 + len(ahead)} items") as caught:
                    await engine.submit([word_job(0)])
                assert caught.value.retry_after_ms > 500
                gated.open()
                await asyncio.gather(*tasks)
                assert len(await engine.submit([word_job(0)])) == 1

    run_async(test())


def test_rows_under_refinement_count_against_capacity(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated, max_queue_items=2) as engine:
            long = asyncio.create_task(engine.submit([word_job(0, refine=RefinementLimits(1_000_000)), word_job(1)]))
            await wait_for_async(lambda: gated.steps > 0)
            assert engine.queue_depth == 0
            await engine.submit([word_job(2)])
            with pytest.raises(QueueFull):
                await engine.submit([word_job(3), word_job(4)])
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            await engine.submit([word_job(3), word_job(4)])

    run_async(test())


def test_row_without_refinement_waits_for_at_most_one_step(gated: GatedRuntime) -> None:
    steps_at_encode: list[int] = []
    gated.before_encode = lambda *_: steps_at_encode.append(gated.steps)

    async def test() -> None:
        async with running_engine(gated) as engine:
            long = asyncio.create_task(engine.submit([word_job(0, refine=RefinementLimits(1_000_000))]))
            await wait_for_async(lambda: gated.steps > 1)
            for number in range(5):
                short = asyncio.create_task(engine.submit([word_job(number)]))
                await asyncio.sleep(0)
                steps_when_queued = gated.steps  # the row is in the queue now
                await short
                assert steps_at_encode[-1] - steps_when_queued <= 1
            assert not long.done()
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)

    run_async(test())


def test_cancelled_request_leaves_the_queue(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            first = await block_inference(engine, gated)
            cancelled, kept = (asyncio.create_task(engine.submit([word_job(i)] * size)) for i, size in ((1, 30), (2, 3)))
            await wait_for_async(lambda: engine.queue_depth == 33)
            cancelled.cancel()
            await wait_for_async(lambda: engine.queue_depth == 3)
            gated.open()
            await asyncio.gather(first, kept)
            assert cancelled.cancelled()
        assert gated.batches == [1, 3]

    run_async(test())


def test_cancelled_request_stops_refining(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            long = asyncio.create_task(engine.submit([word_job(0, refine=RefinementLimits(1_000_000))]))
            await wait_for_async(lambda: gated.steps > 0)
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            await engine.submit([word_job(1)])  # the tick in which the cancelled row leaves
            await engine.submit([word_job(1)])
            steps = gated.steps
            for _ in range(5):  # every tick would run a refinement step, if a row were left
                await engine.submit([word_job(1)])
            assert gated.steps == steps > 0

    run_async(test())


def test_graph_error_fails_its_request_only(gated: GatedRuntime, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("poison")

    async def test() -> None:
        async with running_engine(gated, max_queue_items=40) as engine:
            poison(gated, error)
            first = await block_inference(engine, gated)
            valid = [[word_job(i), word_job(i + 1)] for i in range(10)]
            poisoned = [
                word_job(0, refine=RefinementLimits(5)),
                InferenceJob({"word": POISON}, 0, 1),
                word_job(1, refine=RefinementLimits(5)),
            ]
            tasks = [asyncio.create_task(engine.submit(jobs)) for jobs in [*valid[:5], poisoned, *valid[5:]]]
            await wait_for_async(lambda: engine.queue_depth == 23)
            gated.open()
            all_results = await asyncio.gather(*tasks, return_exceptions=True)
            failure = all_results.pop(5)
            assert isinstance(failure, EngineFailed)
            assert failure.__cause__ is error
            for jobs, results in zip(valid, all_results, strict=True):
                np.testing.assert_allclose(means(results), expected_means(gated, jobs), atol=1e-5)
            await first
            np.testing.assert_allclose(
                means(await engine.submit([word_job(7)])), expected_means(gated, [word_job(7)]), atol=1e-5
            )
            assert gated.steps == 0, "the other rows of the failed request were refined"
            with pytest.raises(QueueFull):
                await engine.submit([word_job(0)] * 41)
            assert len(await engine.submit([word_job(0)] * 40)) == 40, "the failed request still holds capacity"

    run_async(test())
    logged = capsys.readouterr().out
    assert "RuntimeError: poison" in logged
    assert "26, 26, 26" not in logged, "the log holds the input of a request"


@pytest.mark.parametrize("death", [SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__)
def test_death_of_the_inference_thread_fails_every_request(gated: GatedRuntime, death: BaseException) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            poison(gated, death)
            first = await block_inference(engine, gated)
            requests = [[word_job(1)], [InferenceJob({"word": POISON}, 0, 0)], [word_job(2, refine=RefinementLimits(100_000))]]
            tasks = [asyncio.create_task(engine.submit(jobs)) for jobs in requests]
            await wait_for_async(lambda: engine.queue_depth == 3)
            gated.open()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineFailed)
                assert result.__cause__ is death
            await first  # it was finished before
            with pytest.raises(EngineFailed, match="died"):
                await engine.submit([word_job(3)])
            assert engine.queue_depth == 0
            ages = [engine.heartbeat_age]
            while ages[-1] < ages[0] + 2 * BEAT_SECONDS:
                await asyncio.sleep(0.01)
                ages.append(engine.heartbeat_age)
            assert ages == sorted(ages), "a dead thread beats"

    run_async(test())


def test_heartbeat_goes_on_when_idle_and_busy_and_stops_when_stuck(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            await wait_for_beats(engine, 3)
            long = asyncio.create_task(engine.submit([word_job(0, refine=RefinementLimits(1_000_000))]))
            await wait_for_async(lambda: gated.steps > 0)
            await wait_for_beats(engine, 3)
            assert not long.done()
            long.cancel()
            stuck = await block_inference(engine, gated)
            await wait_for_async(lambda: engine.heartbeat_age > 2 * BEAT_SECONDS, message="a stuck thread beats")
            gated.open()
            await stuck
            await asyncio.gather(long, return_exceptions=True)

    run_async(test())


def test_stop_finishes_the_jobs_held_and_accepts_no_more(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            tasks = [await block_inference(engine, gated)]
            tasks += [asyncio.create_task(engine.submit([word_job(i, refine=RefinementLimits(i))])) for i in range(4)]
            await wait_for_async(lambda: engine.queue_depth == 4)
            stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
            await wait_for_async(lambda: engine.failure)
            with pytest.raises(EngineFailed, match="stopped"):
                await engine.submit([word_job(9)])
            assert not stopping.done()
            gated.open()
            await stopping
            all_results = await asyncio.gather(*tasks)
            steps = [results[0].refinement.steps if results[0].refinement else 0 for results in all_results]
            assert steps == [0, 0, 1, 2, 3]

    run_async(test())


def test_stop_with_a_grace_does_not_wait_for_a_stuck_thread(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            stuck = await block_inference(engine, gated)
            await asyncio.to_thread(engine.stop, 0.05)
            with pytest.raises(EngineFailed, match="stopped"):
                await stuck

    run_async(test())


def test_submit_before_start_raises(gated: GatedRuntime) -> None:
    async def test() -> None:
        engine = Engine(gated)
        with pytest.raises(EngineFailed, match="not started"):
            await engine.submit([word_job(0)])
        engine.stop()

    run_async(test())


def test_result_for_a_closed_event_loop_is_dropped(gated: GatedRuntime) -> None:
    """The inference thread survives a caller whose event loop has ended."""
    engine = Engine(gated)
    engine.start()
    loop = asyncio.new_event_loop()
    gated.close()
    task = loop.create_task(engine.submit([word_job(0)]))
    loop.run_until_complete(wait_for_async(gated.entered.is_set))
    loop.close()
    gated.open()

    async def submit() -> None:
        assert len(await engine.submit([word_job(1)])) == 1

    run_async(submit())
    engine.stop()
    assert not task.done()


def test_call_runs_in_the_inference_thread_between_batches(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            request = await block_inference(engine, gated)
            call = asyncio.create_task(engine.call(lambda: threading.current_thread().name))
            await asyncio.sleep(0)
            assert not call.done()
            gated.open()
            assert await call == "inference"
            await request

            def fail() -> None:
                raise ValueError("no graph of this name")

            with pytest.raises(ValueError, match="no graph of this name"):
                await engine.call(fail)
            assert len(await engine.submit([word_job(0)])) == 1
        with pytest.raises(EngineFailed, match="does not run"):
            await engine.call(lambda: None)

    run_async(test())


def test_call_fails_when_the_thread_ends_before_it(gated: GatedRuntime) -> None:
    async def test() -> None:
        async with running_engine(gated) as engine:
            request = await block_inference(engine, gated)
            call = asyncio.create_task(engine.call(lambda: None))
            await asyncio.sleep(0)
            await asyncio.to_thread(engine.stop, 0.1)
            for waiting in (call, request):
                with pytest.raises(EngineFailed, match="stopped"):
                    await waiting

    run_async(test())


@contextlib.asynccontextmanager
async def idle_engine(runtime: GatedRuntime, monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[Engine]:
    """Run an engine that knows how long a row takes and waits for the next one; any time counts as short."""
    monkeypatch.setattr("concord.service.inference.engine.INLINE_SECONDS", 60.0)
    async with running_engine(runtime, **options) as engine:
        await engine.submit([word_job(0)])
        await wait_for_beats(engine, 1)
        yield engine


def test_row_of_a_lone_client_runs_on_the_event_loop(gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the same result. Rows of other clients, several rows, rows that take steps, and rows that take long do not."""
    threads: list[str] = []
    gated.before_encode = lambda *_: threads.append(threading.current_thread().name)

    async def test() -> None:
        async with idle_engine(gated, monkeypatch) as engine:
            threads.clear()
            results = await engine.submit([word_job(7)], alone=True)
            assert threads == ["MainThread"]
            np.testing.assert_allclose(means(results), expected_means(gated, [word_job(7)]), atol=1e-5)
            await engine.submit([word_job(7)])
            await engine.submit([word_job(7), word_job(8)], alone=True)
            await engine.submit([word_job(7, refine=RefinementLimits(steps=1))], alone=True)
            monkeypatch.setattr("concord.service.inference.engine.INLINE_SECONDS", 0.0)
            await engine.submit([word_job(7)], alone=True)
            assert set(threads[1:]) == {"inference"}

    run_async(test())


def test_row_of_a_lone_client_joins_the_batch_of_a_busy_engine(gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with idle_engine(gated, monkeypatch) as engine:
            gated.batches.clear()
            first = await block_inference(engine, gated)
            others = [asyncio.create_task(engine.submit([word_job(i)], alone=True)) for i in range(3)]
            await wait_for_async(lambda: engine.queue_depth == 3)
            gated.open()
            await asyncio.gather(first, *others)
            assert gated.batches == [1, 3]

    run_async(test())


def test_failing_rows_of_a_lone_client_open_the_circuit(gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with idle_engine(gated, monkeypatch, max_failures=2, probe_seconds=0.01) as engine:
            gated.before_encode = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
            for _ in range(2):
                with pytest.raises(EngineFailed, match="failed on this request"):
                    await engine.submit([word_job(1)], alone=True)
            await wait_for_async(lambda: engine.failure is not None)
            gated.before_encode = lambda *_: None
            await wait_for_async(lambda: engine.failure is None)
            assert len(await engine.submit([word_job(1)], alone=True)) == 1

    run_async(test())


def test_device_lost_on_the_event_loop_ends_the_inference_thread(gated: GatedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()

    async def test() -> None:
        async with idle_engine(gated, monkeypatch, on_device_lost=lost.set) as engine:
            gated.before_encode = lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA failure 700: illegal access"))
            with pytest.raises(EngineFailed, match="is lost"):
                await engine.submit([word_job(1)], alone=True)
            assert engine.device_lost
            assert await asyncio.to_thread(lost.wait, 10)

    run_async(test())
