"""The thread, the queue before it and the futures behind it: bounded, cancellable, and never silent when something dies."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from time import monotonic
from typing import Any

import numpy as np
import pytest

from model import bundle
from model.modality import collate
from model.runtime import Posterior, Runtime
from service.engine import BEAT_SECONDS, Engine, EngineFailed, Outcome, QueueFull, Refine, Work


class Gated(Runtime):
    """The real graphs behind a gate, so that a test decides when the inference thread goes on. Some words are poison."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()
        self.batches: list[int] = []
        self.steps = self.steps_at_encode = 0
        self.poison: BaseException | None = None

    def encode(self, inputs: Any, present: Any) -> Posterior:
        self.batches.append(len(present))
        self.steps_at_encode = self.steps
        self.arrived.set()
        assert self.gate.wait(30), "the test never opened the gate"
        if self.poison and (inputs["word"] == POISON).all(axis=1).any():
            raise self.poison
        return super().encode(inputs, present)

    def refine(self, inputs: Any, present: Any, posterior: Any, anchor: Any, noise: Any) -> Any:
        self.steps += 1
        return super().refine(inputs, present, posterior, anchor, noise)


POISON = np.full(8, 26, np.int64)


@pytest.fixture(scope="module")
def opened() -> bundle.Bundle:
    return bundle.read(bundle.builtin("digits"))


@pytest.fixture
def gated(opened: bundle.Bundle) -> Gated:
    return Gated(opened, threads=1)


def word(number: int, **options: Any) -> Work:
    """A work whose answer tells it from every other number's."""
    letters = [number // 26**place % 26 + 1 for place in range(3)]
    return Work({"word": np.array([*letters, 0, 0, 0, 0, 0], np.int64)}, seed=0, index=0, **options)


def encoded(runtime: Runtime, works: Sequence[Work]) -> np.ndarray:
    return np.concatenate([Runtime.encode(runtime, *collate(runtime.modalities, [work.row])).mean for work in works])


def means(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.stack([outcome.mean for outcome in outcomes])


@contextlib.asynccontextmanager
async def running(runtime: Runtime, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(runtime, **options)
    engine.start()
    try:
        yield engine
    finally:
        if isinstance(runtime, Gated):
            runtime.gate.set()
        await asyncio.to_thread(engine.stop)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(condition: Any) -> None:
    """Let the event loop turn until the condition holds."""
    deadline = monotonic() + 20
    while not condition():
        assert monotonic() < deadline, "this never came to be"
        await asyncio.sleep(0.002)


async def blocked(engine: Engine, runtime: Gated) -> "asyncio.Task[list[Outcome]]":
    """Hold the inference thread inside a run with one row."""
    runtime.arrived.clear()
    runtime.gate.clear()
    task = asyncio.create_task(engine.submit([word(0)]))
    assert await asyncio.to_thread(runtime.arrived.wait, 20)
    return task


def test_every_request_gets_its_own_answers_in_its_order(gated: Gated) -> None:
    async def test() -> None:
        requests = [[word(10 * request + item) for item in range(1 + request % 4)] for request in range(60)]
        async with running(gated) as engine:
            answers = await asyncio.gather(*(engine.submit(works) for works in requests))
        for works, outcomes in zip(requests, answers, strict=True):
            np.testing.assert_allclose(means(outcomes), encoded(gated, works), atol=1e-5)

    run(test())


def test_what_waits_runs_together_up_to_the_batch_limit(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated, max_batch=8) as engine:
            first = await blocked(engine, gated)
            others = [asyncio.create_task(engine.submit([word(i), word(i + 1)])) for i in range(10)]
            await until(lambda: engine.queue_depth == 20)
            gated.gate.set()
            await asyncio.gather(first, *others)
            assert engine.queue_depth == 0
        assert gated.batches == [1, 8, 8, 4]

    run(test())


def test_a_request_without_works_is_answered_at_once(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            assert await engine.submit([]) == []
        assert gated.batches == []

    run(test())


def test_the_bound_counts_items_and_takes_requests_whole_or_not_at_all(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated, max_queue_items=10) as engine:
            tasks = [await blocked(engine, gated)]
            tasks.append(asyncio.create_task(engine.submit([word(i) for i in range(5)])))
            await until(lambda: engine.queue_depth == 5)
            with pytest.raises(QueueFull, match="holds 6 items") as caught:
                await engine.submit([word(i) for i in range(5)])
            assert caught.value.waiting == 6
            assert caught.value.retry_after_ms > 0
            assert engine.queue_depth == 5
            tasks.append(asyncio.create_task(engine.submit([word(i) for i in range(4)])))
            await until(lambda: engine.queue_depth == 9)
            with pytest.raises(QueueFull):
                await engine.submit([word(0)])
            gated.gate.set()
            assert [len(outcomes) for outcomes in await asyncio.gather(*tasks)] == [1, 5, 4]
            assert len(await engine.submit([word(i) for i in range(10)])) == 10
            with pytest.raises(QueueFull):
                await engine.submit([word(i) for i in range(11)])

    run(test())


def test_threads_cannot_overfill_the_queue(gated: Gated) -> None:
    """Places are looked for and taken in one step."""

    async def test() -> None:
        async with running(gated, max_queue_items=50) as engine:
            first = await blocked(engine, gated)
            taken: list[int] = []

            async def ask(size: int) -> None:
                with contextlib.suppress(QueueFull):
                    taken.append(len(await engine.submit([word(i) for i in range(size)])))

            async def crowd() -> None:
                await asyncio.gather(*(ask(1 + number % 7) for number in range(40)))

            loops = [threading.Thread(target=asyncio.run, args=(crowd(),)) for _ in range(8)]
            for loop in loops:
                loop.start()
            await until(lambda: engine.queue_depth > 40)
            assert engine.queue_depth <= 49
            gated.gate.set()
            await first
            await asyncio.to_thread(lambda: [loop.join() for loop in loops])
            assert engine.queue_depth == 0
            assert sum(taken) > 40

    run(test())


def test_a_wait_that_is_foreseen_to_be_too_long_is_refused(gated: Gated) -> None:
    """As long as the work ahead takes, not as many items as there are: a row that is refined counts as often as it runs."""
    encode = gated.encode

    def slow(inputs: Any, present: Any) -> Posterior:
        time.sleep(0.01 * len(present))
        return encode(inputs, present)

    gated.encode = slow  # type: ignore[method-assign]

    async def test() -> None:
        async with running(gated, max_wait=0.5) as engine:
            await engine.submit([word(i) for i in range(200)])  # whatever is asked of an idle engine is taken
            for ahead in ([word(i) for i in range(100)], [word(0, refine=Refine(100))]):
                tasks = [await blocked(engine, gated), asyncio.create_task(engine.submit(ahead))]
                await until(lambda ahead=ahead: engine.queue_depth == len(ahead))
                with pytest.raises(QueueFull, match=f"holds {1 + len(ahead)} items") as caught:
                    await engine.submit([word(0)])
                assert caught.value.retry_after_ms > 500
                gated.gate.set()
                await asyncio.gather(*tasks)
                assert len(await engine.submit([word(0)])) == 1

    run(test())


def test_rows_under_refinement_count_too(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated, max_queue_items=2) as engine:
            long = asyncio.create_task(engine.submit([word(0, refine=Refine(10_000)), word(1)]))
            await until(lambda: gated.steps > 0)
            assert engine.queue_depth == 0
            await engine.submit([word(2)])
            with pytest.raises(QueueFull):
                await engine.submit([word(3), word(4)])
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            await engine.submit([word(3), word(4)])

    run(test())


def test_a_long_refinement_does_not_delay_a_short_row(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            long = asyncio.create_task(engine.submit([word(0, refine=Refine(10_000))]))
            await until(lambda: gated.steps > 1)
            for number in range(5):
                short = asyncio.create_task(engine.submit([word(number)]))
                await asyncio.sleep(0)
                before = gated.steps  # with the row in the queue
                await short
                assert gated.steps_at_encode - before <= 1
            assert not long.done()
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)

    run(test())


def test_cancelled_rows_leave_the_queue(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            first = await blocked(engine, gated)
            gone, kept = (asyncio.create_task(engine.submit([word(i)] * size)) for i, size in ((1, 30), (2, 3)))
            await until(lambda: engine.queue_depth == 33)
            gone.cancel()
            await until(lambda: engine.queue_depth == 3)
            gated.gate.set()
            await asyncio.gather(first, kept)
            assert gone.cancelled()
        assert gated.batches == [1, 3]

    run(test())


def test_cancelled_rows_stop_refining(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await engine.submit([word(0, refine=Refine(1_000_000))])
            await engine.submit([word(1)])  # the tick that retires the row has begun
            await engine.submit([word(1)])
            steps = gated.steps
            await asyncio.sleep(0.1)
            assert gated.steps == steps > 0

    run(test())


def test_a_fault_fails_its_request_and_no_other(gated: Gated, capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with running(gated, max_queue_items=40) as engine:
            gated.poison = RuntimeError("poison")
            first = await blocked(engine, gated)
            innocent = [[word(i), word(i + 1)] for i in range(10)]
            guilty = [word(0, refine=Refine(5)), Work({"word": POISON}, 0, 1), word(1, refine=Refine(5))]
            tasks = [asyncio.create_task(engine.submit(works)) for works in [*innocent[:5], guilty, *innocent[5:]]]
            await until(lambda: engine.queue_depth == 23)
            gated.gate.set()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            failure = answers.pop(5)
            assert isinstance(failure, EngineFailed)
            assert failure.__cause__ is gated.poison
            for works, outcomes in zip(innocent, answers, strict=True):
                np.testing.assert_allclose(means(outcomes), encoded(gated, works), atol=1e-5)
            await first
            np.testing.assert_allclose(means(await engine.submit([word(7)])), encoded(gated, [word(7)]), atol=1e-5)
            assert gated.steps == 0  # the rest of the failed request was not refined
            with pytest.raises(QueueFull):  # and holds no place
                await engine.submit([word(0)] * 41)
            assert len(await engine.submit([word(0)] * 40)) == 40

    run(test())
    logged = capsys.readouterr().out
    assert "RuntimeError: poison" in logged
    assert "26, 26, 26" not in logged  # what a user sent stays out of the log


@pytest.mark.parametrize("death", [SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__)
def test_when_the_thread_dies_nobody_waits(gated: Gated, death: BaseException) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            gated.poison = death
            first = await blocked(engine, gated)
            works = [[word(1)], [Work({"word": POISON}, 0, 0)], [word(2, refine=Refine(100_000))]]
            tasks = [asyncio.create_task(engine.submit(one)) for one in works]
            await until(lambda: engine.queue_depth == 3)
            gated.gate.set()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(answer, EngineFailed)
                assert answer.__cause__ is death
            await first  # it was answered before
            with pytest.raises(EngineFailed, match="died"):
                await engine.submit([word(3)])
            assert engine.queue_depth == 0
            age = engine.heartbeat_age
            await asyncio.sleep(2 * BEAT_SECONDS)
            assert engine.heartbeat_age >= age + 1.9 * BEAT_SECONDS

    run(test())


def test_it_beats_when_idle_and_when_busy_but_not_when_stuck(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            await asyncio.sleep(3 * BEAT_SECONDS)
            assert engine.heartbeat_age < 2 * BEAT_SECONDS
            long = asyncio.create_task(engine.submit([word(0, refine=Refine(1_000_000))]))
            await asyncio.sleep(3 * BEAT_SECONDS)
            assert engine.heartbeat_age < 2 * BEAT_SECONDS
            long.cancel()
            stuck = await blocked(engine, gated)
            await asyncio.sleep(3 * BEAT_SECONDS)
            assert engine.heartbeat_age > 2 * BEAT_SECONDS
            gated.gate.set()
            await stuck
            await asyncio.gather(long, return_exceptions=True)

    run(test())


def test_stop_finishes_what_is_held_and_takes_no_more(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            tasks = [await blocked(engine, gated)]
            tasks += [asyncio.create_task(engine.submit([word(i, refine=Refine(i))])) for i in range(4)]
            await until(lambda: engine.queue_depth == 4)
            stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
            await asyncio.sleep(0.05)
            assert not stopping.done()
            with pytest.raises(EngineFailed, match="stopped"):
                await engine.submit([word(9)])
            gated.gate.set()
            await stopping
            answers = await asyncio.gather(*tasks)
            assert [outcomes[0].refinement.steps if outcomes[0].refinement else 0 for outcomes in answers] == [0, 0, 1, 2, 3]

    run(test())


def test_stop_does_not_wait_for_ever_for_a_stuck_thread(gated: Gated) -> None:
    async def test() -> None:
        async with running(gated) as engine:
            stuck = await blocked(engine, gated)
            await asyncio.to_thread(engine.stop, 0.05)
            with pytest.raises(EngineFailed, match="stopped"):
                await stuck

    run(test())


def test_an_engine_that_was_never_started_says_so(gated: Gated) -> None:
    async def test() -> None:
        engine = Engine(gated)
        with pytest.raises(EngineFailed, match="not started"):
            await engine.submit([word(0)])
        engine.stop()

    run(test())


def test_an_answer_after_the_loop_is_closed_is_dropped(gated: Gated) -> None:
    """The thread survives callers that are gone with their event loop."""
    engine = Engine(gated)
    engine.start()
    loop = asyncio.new_event_loop()
    gated.gate.clear()
    task = loop.create_task(engine.submit([word(0)]))
    loop.run_until_complete(asyncio.wait([task], timeout=0.05))
    assert gated.arrived.wait(20)
    loop.close()
    gated.gate.set()

    async def ask() -> None:
        assert len(await engine.submit([word(1)])) == 1

    run(ask())
    engine.stop()
    assert not task.done()
