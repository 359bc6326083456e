"""The inference thread: a bounded queue before it, futures behind it, a heartbeat inside, and a circuit around it."""

import asyncio
import contextlib
import math
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from time import monotonic

import structlog

from model.runtime import Runtime
from service.exercise import exercise
from service.scheduler import Observer, Row, Scheduler, Silent
from service.work import EngineFailed, Outcome, QueueFull, Refine, Refinement, Work

__all__ = ["Engine", "EngineFailed", "Observer", "Outcome", "QueueFull", "Refine", "Refinement", "Work"]

BEAT_SECONDS = 0.5
"""The idle thread beats this often."""
AT_ONCE_SECONDS = 0.001
"""What is foreseen to take no longer may run on the event loop: the way to the thread and back would cost as much."""
MIN_RETRY_MS = 50
LENIENCE = 1.25
"""Of the longest wait, for what is decoded already: several are let in while the first of them is."""
MEMORY = 0.99
"""What is left of the last tick's weight, and of the last request's, when the next one is measured."""

log = structlog.get_logger("concord")


class _Request:
    """Rows that are answered together."""

    __slots__ = ("future", "loop", "missing", "rows")

    def __init__(self, works: Sequence[Work]) -> None:
        now = monotonic()
        self.rows = [Row(work, now) for work in works]
        self.missing = len(self.rows)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Outcome]] = self.loop.create_future()

    def resolve(self, answer: list[Outcome] | EngineFailed) -> None:
        """On its event loop. Too late an answer is dropped."""
        if self.future.done():
            return
        if isinstance(answer, EngineFailed):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


Answer = tuple[_Request, list[Outcome] | EngineFailed]


class Engine:
    """Runs works in one thread of its own, whatever is waiting together, without timers.

    Args:
        runtime: the graphs.
        max_queue_items: items held, waiting or under way, at most. A request is taken whole or refused.
        max_wait: seconds that the work held may take, as foreseen. While it takes longer nothing is accepted: who waits beyond
            a deadline has cost what others needed.
        max_batch: rows in one run of a graph.
        max_failures: batches of which no row succeeds, in a row, before requests are refused.
        probe_seconds: between two looks whether the graphs work again.
        observer: hears of batches, stages, waits and refinements, in the inference thread.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_queue_items: int = 512,
        max_wait: float = math.inf,
        max_batch: int = 64,
        max_failures: int = 5,
        probe_seconds: float = 2.0,
        observer: Observer | None = None,
    ) -> None:
        self._runtime = runtime
        self._scheduler = Scheduler(runtime, max_batch=max_batch, observer=observer or Silent())
        self._max_queue_items = max_queue_items
        self._max_wait = max_wait
        self._max_failures = max_failures
        self._probe_seconds = probe_seconds
        self._failures = 0
        self._waiting: deque[Row] = deque()
        self._waker: asyncio.AbstractEventLoop | None = None  # will wake the thread at the end of this turn
        self._owners: dict[Row, _Request] = {}  # every row held; guarded by the condition, like the queue
        self._changed = threading.Condition()
        self._trouble: EngineFailed | None = EngineFailed("the engine is not started")
        self._closing = False
        self._held_runs = 0  # of all rows held; guarded as they are
        self._busy = self._runs = 0.0  # seconds and runs of the last ticks
        self._usual_runs = 1.0  # of the last requests
        self._row_seconds = math.inf  # of a row's first run, lately
        self._parked = self._stepping = False  # the thread waits for rows, or refines some
        self._beat = monotonic()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def queue_depth(self) -> int:
        """Items that wait for their first run."""
        return len(self._waiting)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the inference thread last showed life. It beats between runs, and idle every ``BEAT_SECONDS``."""
        return monotonic() - self._beat

    @property
    def trouble(self) -> str | None:
        """Why no request is taken; None while they are."""
        trouble = self._trouble
        return None if trouble is None else str(trouble)

    @property
    def running(self) -> bool:
        """The inference thread exists."""
        return self._thread.is_alive()

    @property
    def max_batch(self) -> int:
        """Rows in one run, now."""
        return self._scheduler.max_batch

    def start(self) -> None:
        """Start the thread. Once in an engine's life."""
        self._trouble = None
        self._beat = monotonic()
        self._thread.start()

    def stop(self, grace: float | None = None) -> None:
        """Take no more, finish what is held, and end the thread. Blocks: call it off the event loop while requests run.

        Args:
            grace: seconds after which what is still held fails. None: as long as it takes.
        """
        with self._changed:
            self._trouble = EngineFailed("the engine has stopped")
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(grace)
        self._fail_all(self._trouble)

    def refusal(self, coming: int = 0) -> QueueFull | EngineFailed | None:
        """Why one more request need not be decoded. A look without the lock: ``submit`` decides.

        Args:
            coming: requests that are being decoded now; each is taken for an item that runs as often as the usual one.
        """
        return self._objection(coming + 1, self._max_wait, coming * self._usual_runs)

    async def submit(self, works: Sequence[Work]) -> list[Outcome]:
        """Outcomes of one request, in its order. Cancelling the caller retires its rows.

        Raises:
            QueueFull: not all of the items fit now; none was taken.
            EngineFailed: a graph raised on one of these rows, or the engine does not run.
        """
        if not works:
            return []
        request = _Request(works)
        with self._changed:
            objection = self._objection(len(works), LENIENCE * self._max_wait)
            if objection is not None:
                raise objection
            self._owners.update(dict.fromkeys(request.rows, request))
            runs = sum(row.work.runs for row in request.rows)
            self._held_runs += runs
            self._usual_runs = MEMORY * self._usual_runs + (1 - MEMORY) * runs
            self._waiting.extend(request.rows)
        self._wake_soon(request.loop)
        try:
            return await request.future
        except asyncio.CancelledError:
            with self._changed:
                self._release(request)
            raise

    def _wake_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once what is ready in this turn of the event loop has been submitted too: it runs together, and the two threads do
        not take the interpreter from each other for every request."""
        if self._waker is not loop:
            self._waker = loop
            loop.call_soon(self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waker = None
        with self._changed:
            rows = self._at_once(loop)
            if len(self._waiting) > len(rows):
                self._changed.notify()
            if not rows:
                return
            self._waiting = deque(row for row in self._waiting if row not in rows)
        _resolve(self._settle(self._admit(rows)))

    def _at_once(self, loop: asyncio.AbstractEventLoop) -> list[Row]:
        """Rows to run on the event loop: what one quick run answers, where a single request waits and the thread is idle, or
        where the thread refines, for a step of that would hold them up."""
        if self._failures or self._runtime.device != "cpu":
            return []
        rows = [row for row in self._waiting if row.work.runs == 1 and self._owners[row].loop is loop]
        alone = self._parked and len({self._owners[row] for row in self._waiting}) == 1
        quick = len(rows) <= self._scheduler.max_batch and len(rows) * self._row_seconds <= AT_ONCE_SECONDS
        return rows if rows and quick and (alone or self._stepping) else []

    def _admit(self, rows: list[Row]) -> list[Row]:
        began = monotonic()
        done = self._scheduler.admit(rows)
        if rows:
            seconds = (monotonic() - began) / len(rows)
            self._row_seconds = seconds if self._row_seconds == math.inf else 0.8 * self._row_seconds + 0.2 * seconds
        return done

    def _objection(self, items: int, max_wait: float, more_runs: float = 0.0) -> QueueFull | EngineFailed | None:
        """Made and not raised where nobody asks for that: most answers under overload are this one."""
        if (trouble := self._trouble) is not None:
            own = EngineFailed(*trouble.args)
            own.__cause__ = trouble.__cause__
            return own
        held = len(self._owners)
        wait = (self._held_runs + more_runs) * self._busy / self._runs if self._runs else 0.0
        if held + items > self._max_queue_items or wait > max_wait:
            return QueueFull(held, retry_after_ms=max(MIN_RETRY_MS, int(1000 * wait)))
        return None

    def _run(self) -> None:
        try:
            while (rows := self._take()) is not None:
                began, runs = monotonic(), self._scheduler.runs
                _post(self._settle(self._admit(rows)))
                self._stepping = self._scheduler.active > 0
                _post(self._settle(self._scheduler.step()))
                self._stepping = False
                if (ran := self._scheduler.runs - runs) > 0:
                    with self._changed:
                        self._busy = MEMORY * self._busy + monotonic() - began
                        self._runs = MEMORY * self._runs + ran
                if self._failures >= self._max_failures:
                    self._prove()
        except BaseException as error:  # SystemExit too: nobody may wait for a thread that is gone
            log.critical("the inference thread died", exception=_trace(error))
            failure = EngineFailed("the inference thread died")
            failure.__cause__ = error
            with self._changed:
                self._trouble = failure
            self._fail_all(failure)

    def _take(self) -> list[Row] | None:
        """Rows to admit, perhaps none; None when the engine is closed and has nothing left to do."""
        with self._changed:
            self._beat = monotonic()
            if not self._waiting and not self._scheduler.active:
                if self._closing:
                    return None
                self._parked = True
                self._changed.wait(BEAT_SECONDS)
                self._parked = False
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._scheduler.max_batch))]

    def _prove(self) -> None:
        """Do the graphs fail, or only on what was sent? Refuses requests until rows that nobody sent come through."""
        while (error := self._trial()) is not None and not self._closing:
            failure = EngineFailed(f"the model failed {self._failures} times in a row")
            failure.__cause__ = error
            with self._changed:
                if self._trouble is None:
                    log.critical("circuit open", failures=self._failures, exception=_trace(error))
                    self._trouble = failure
            self._fail_all(failure)
            with self._changed:
                until = monotonic() + self._probe_seconds
                while not self._closing and (left := until - monotonic()) > 0:
                    self._beat = monotonic()
                    self._changed.wait(min(left, BEAT_SECONDS))
        self._failures = 0
        with self._changed:
            if self._trouble is not None and not self._closing:
                log.warning("circuit closed")
                self._trouble = None

    def _trial(self) -> Exception | None:
        self._beat = monotonic()
        try:
            exercise(self._runtime, 1)
        except Exception as error:  # whatever the graphs raise
            return error
        return None

    def _settle(self, rows: Sequence[Row]) -> list[Answer]:
        """The answers to the requests that these rows complete or fail."""
        if any(isinstance(row.outcome, Outcome) for row in rows):
            self._failures = 0
        elif any(isinstance(row.outcome, Exception) for row in rows):
            self._failures += 1
        answers: list[Answer] = []
        with self._changed:
            for row in rows:
                request = self._owners.pop(row, None)
                if request is None:  # abandoned meanwhile
                    continue
                self._held_runs -= row.work.runs
                request.missing -= 1
                if isinstance(row.outcome, Exception):
                    self._release(request)
                    failure = EngineFailed("the model failed on this request")
                    failure.__cause__ = row.outcome
                    answers.append((request, failure))
                elif request.missing == 0:
                    answers.append((request, [other.outcome for other in request.rows if isinstance(other.outcome, Outcome)]))
        for _, answer in answers:
            if isinstance(answer, EngineFailed) and answer.__cause__ is not None:
                log.error("a graph failed", exception=_trace(answer.__cause__))
        return answers

    def _release(self, request: _Request) -> None:
        """Forget a request that nobody waits for; with the condition held. Rows under way leave at the next tick."""
        for row in request.rows:
            row.abandoned = True
            if self._owners.pop(row, None) is not None:
                self._held_runs -= row.work.runs
        self._waiting = deque(row for row in self._waiting if not row.abandoned)

    def _fail_all(self, failure: EngineFailed) -> None:
        with self._changed:
            requests = set(self._owners.values())
            for request in requests:
                self._release(request)
        _post([(request, failure) for request in requests])


def _post(answers: Sequence[Answer]) -> None:
    """Hand them to their event loops, all at once: to wake one costs as much as to answer."""
    for loop in {request.loop for request, _ in answers}:
        own = [answer for answer in answers if answer[0].loop is loop]
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(_resolve, own)


def _resolve(answers: Sequence[Answer]) -> None:
    for request, answer in answers:
        request.resolve(answer)


def _trace(error: BaseException) -> str:
    """Without the values of local variables, which some renderers add: they hold what users sent."""
    return "".join(traceback.format_exception(error))
