"""The inference thread: a bounded queue in front, futures behind, a heartbeat, and a circuit breaker."""

import asyncio
import contextlib
import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, TypeVar

import structlog

from concord.model.runtime import Runtime
from concord.model.runtime.device import DeviceLostError, classify
from concord.service.inference.jobs import EngineFailed, InferenceJob, InferenceResult, QueueFull
from concord.service.inference.scheduler import NullObserver, Observer, Row, Scheduler

BEAT_SECONDS = 0.5
"""Heartbeat interval of the idle thread."""
MIN_RETRY_MS = 50
SUBMIT_TOLERANCE = 1.25
"""Factor on the longest wait for requests that are parsed already: several pass the first check while one is parsed."""
INLINE_SECONDS = 0.002
"""The row of a lone client runs on the event loop if that takes less: two changes of threads cost as much."""
DECAY = 0.99
"""Weight that the running averages keep at each new measurement."""

log = structlog.get_logger("concord")

T = TypeVar("T")


class _Request:
    """Rows whose results are returned together."""

    __slots__ = ("future", "loop", "missing", "rows")

    def __init__(self, jobs: Sequence[InferenceJob]) -> None:
        now = monotonic()
        self.rows = [Row(job, now) for job in jobs]
        self.missing = len(self.rows)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[InferenceResult]] = self.loop.create_future()

    def resolve(self, results: list[InferenceResult] | EngineFailed) -> None:
        """Called on its event loop. Has no effect if the caller is gone."""
        if self.future.done():
            return
        if isinstance(results, EngineFailed):
            self.future.set_exception(results)
        else:
            self.future.set_result(results)


Resolution = tuple[_Request, list[InferenceResult] | EngineFailed]


class Engine:
    """Runs jobs in one dedicated thread: all waiting rows run together, without timers.

    The single row of a lone client may run on the event loop instead, while the thread waits, see ``_run_inline``.

    Args:
        runtime: the graphs.
        max_queue_items: most jobs held, waiting or running. A request is accepted whole or rejected.
        max_wait: seconds. While the jobs held are expected to take longer, requests are rejected: a request that would miss its
            deadline must not take time from others.
        max_batch: rows in one run of a graph.
        max_failures: consecutive batches without a success, after which requests are rejected.
        probe_seconds: between two self-tests while requests are rejected.
        observer: receives batches, stages, waits, refinements and errors, in the thread that runs the graphs, one at a time.
        on_device_lost: called in the inference thread before it ends because no graph can run any more.
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
        on_device_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._runtime = runtime
        self._on_device_lost = on_device_lost
        self._scheduler = Scheduler(runtime, max_batch=max_batch, observer=observer or NullObserver(), max_rows=max_queue_items)
        self._max_queue_items = max_queue_items
        self._max_wait = max_wait
        self._max_failures = max_failures
        self._probe_seconds = probe_seconds
        self._failures = 0
        self._waiting: deque[Row] = deque()
        self._waker: asyncio.AbstractEventLoop | None = None  # wakes the thread at the end of its current iteration
        self._owners: dict[Row, _Request] = {}  # every row held; guarded by the condition, like the queue
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._failure: EngineFailed | None = EngineFailed("the engine is not started")
        self.device_lost = False
        """No graph can run in this process any more."""
        self._closing = False
        self._idle = False  # the thread waits for rows; guarded by the condition
        self._lengths = {name: text.length for name, text in runtime.autoregressive.items()}
        self._row_seconds = math.inf  # running average over runs of one row
        self._inline_error: BaseException | None = None  # raised again in the thread, which handles it
        self._held_runs = 0  # of all rows held; guarded by the condition
        self._busy = self._runs = 0.0  # running averages over ticks: seconds, and passes of rows through graphs
        self._usual_runs = 1.0  # running average over requests
        self._beat = monotonic()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def queue_depth(self) -> int:
        """Jobs that wait for their first run."""
        return len(self._waiting)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat. The thread beats between runs, and every ``BEAT_SECONDS`` while idle."""
        return monotonic() - self._beat

    @property
    def failure(self) -> str | None:
        """Why no request is accepted; None while they are."""
        failure = self._failure
        return None if failure is None else str(failure)

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
        self._failure = None
        self._beat = monotonic()
        self._thread.start()

    def stop(self, grace: float | None = None) -> None:
        """Accept no more jobs, finish those held, and end the thread. Blocks: call it off the event loop while requests run.

        Args:
            grace: seconds after which the jobs still held fail. None: wait as long as it takes.
        """
        with self._changed:
            self._failure = EngineFailed("the engine has stopped")
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(grace)
        self._fail_all(self._failure)

    def warm_up(self) -> None:
        """Run every graph at every batch size. Call it in the inference thread, with ``call``.

        The first run at a size allocates memory and may prepare kernels; no request should wait for that.
        """
        for rows in self._runtime.batch_sizes:
            self._runtime.warm_up(rows)
        self._scheduler.warm_up()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the inference thread, between two batches, and return its result.

        Some libraries of a GPU keep their state for each thread: what runs in another thread does not warm up this one.

        Raises:
            EngineFailed: the engine does not run.
            Exception: what the function raises.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closing or not self.running:
                raise EngineFailed("the engine does not run")
            self._calls.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def check_capacity(self, pending: int = 0) -> QueueFull | EngineFailed | None:
        """Why one more request would be rejected now; None if it would be accepted. Takes no lock: ``submit`` decides.

        Args:
            pending: requests that are being parsed; each counts as one job of average length.
        """
        return self._rejection(pending + 1, self._max_wait, pending * self._usual_runs)

    async def submit(self, jobs: Sequence[InferenceJob], *, alone: bool = False) -> list[InferenceResult]:
        """Results of one request, in its order. Cancelling the caller removes its rows.

        Args:
            alone: there is no other client, so nothing is gained by waiting for rows to run together.

        Raises:
            QueueFull: not all of the jobs fit now; none was accepted.
            EngineFailed: a graph raised an error on one of these rows, or the engine does not run.
        """
        if not jobs:
            return []
        request = _Request(jobs)
        with self._changed:
            rejection = self._rejection(len(jobs), SUBMIT_TOLERANCE * self._max_wait)
            if rejection is not None:
                raise rejection
            self._owners.update(dict.fromkeys(request.rows, request))
            runs = sum(row.job.runs(self._lengths) for row in request.rows)
            self._held_runs += runs
            self._usual_runs = DECAY * self._usual_runs + (1 - DECAY) * runs
            self._waiting.extend(request.rows)
            ran = alone and self._run_inline()
        if not ran:
            self._wake_soon(request.loop)
        try:
            return await request.future
        except asyncio.CancelledError:
            with self._changed:
                self._release(request)
            raise

    def _wake_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the thread once all tasks that are ready in this iteration of the event loop have submitted too: their rows run
        together, and the two threads do not switch for every request."""
        if self._waker is not loop:
            self._waker = loop
            loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._waker = None
        with self._changed:
            self._changed.notify()

    def _run_inline(self) -> bool:
        """Run the one row that waits, on the event loop; the condition is held, so the thread does not run. Returns whether it
        ran. On a GPU it does not: its libraries keep their state for each thread."""
        if not (
            self._idle
            and len(self._waiting) == 1
            and self._waiting[0].job.runs(self._lengths) == 1
            and self._row_seconds < INLINE_SECONDS
            and not self._calls
            and self._runtime.device.is_cpu
        ):
            return False
        try:
            self._run_rows([self._waiting.popleft()], _resolve)
        except BaseException as error:
            self._inline_error = error
        if self._inline_error is not None or self._failures >= self._max_failures:
            self._changed.notify()
        return True

    def _rejection(self, jobs: int, max_wait: float, more_runs: float = 0.0) -> QueueFull | EngineFailed | None:
        """Returned, not raised: under overload this is the hot path."""
        if (failure := self._failure) is not None:
            own = EngineFailed(*failure.args)
            own.__cause__ = failure.__cause__
            return own
        held = len(self._owners)
        wait = (self._held_runs + more_runs) * self._busy / self._runs if self._runs else 0.0
        if held + jobs > self._max_queue_items or wait > max_wait:
            return QueueFull(held, retry_after_ms=max(MIN_RETRY_MS, int(1000 * wait)))
        return None

    def _run(self) -> None:
        try:
            while (rows := self._take()) is not None:
                self._run_calls()
                self._run_rows(rows, _post)
                if self._failures >= self._max_failures:
                    self._probe_until_healthy()
        except DeviceLostError as error:
            log.critical("device lost", exception=_trace(error))
            self.device_lost = True
            self._end(EngineFailed(f"{self._runtime.device} is lost, and the process ends"), error)
            self._on_device_lost()
        except BaseException as error:  # SystemExit too: no request may wait for a thread that has ended
            log.critical("inference thread died", exception=_trace(error))
            self._end(EngineFailed("the inference thread died"), error)

    def _run_rows(self, rows: list[Row], resolve: Callable[[Sequence[Resolution]], None]) -> None:
        """Run new rows, then one step of those under refinement."""
        began, runs = monotonic(), self._scheduler.runs
        self._settle(self._scheduler.add(rows), resolve)
        self._settle(self._scheduler.step(), resolve)
        if (ran := self._scheduler.runs - runs) > 0:
            with self._changed:
                seconds = monotonic() - began
                self._busy = DECAY * self._busy + seconds
                self._runs = DECAY * self._runs + ran
                if ran == 1:
                    self._row_seconds = seconds if math.isinf(self._row_seconds) else (self._row_seconds + seconds) / 2

    def _end(self, failure: EngineFailed, error: BaseException) -> None:
        failure.__cause__ = error
        with self._changed:
            self._failure = failure
        self._fail_all(failure)

    def _run_calls(self) -> None:
        """Run what ``call`` received.

        Raises:
            DeviceLostError: a function raised an error that says so.
        """
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # graphs raise errors of any class
                future.set_exception(error)
                if classify(error) == "lost":
                    raise DeviceLostError(f"{self._runtime.device} is lost for this process: {error}") from error

    def _take(self) -> list[Row] | None:
        """Rows to add, perhaps none; None when the engine is closed and has nothing left to do."""
        with self._changed:
            self._beat = monotonic()
            if not self._waiting and not self._scheduler.active and not self._calls:
                if self._closing:
                    return None
                self._idle = True
                self._changed.wait(BEAT_SECONDS)
                self._idle = False
            if self._inline_error is not None:
                raise self._inline_error
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._scheduler.max_batch))]

    def _probe_until_healthy(self) -> None:
        """Do the graphs fail on any input, or only on what was sent? Rejects requests until a self-test passes.

        Raises:
            DeviceLostError: a self-test says so.
        """
        while (error := self._self_test()) is not None and not self._closing:
            failure = EngineFailed(f"the model failed {self._failures} times in a row")
            failure.__cause__ = error
            with self._changed:
                if self._failure is None:
                    log.critical("circuit open", failures=self._failures, exception=_trace(error))
                    self._failure = failure
            self._fail_all(failure)
            with self._changed:
                until = monotonic() + self._probe_seconds
                while not self._closing and (left := until - monotonic()) > 0:
                    self._beat = monotonic()
                    self._changed.wait(min(left, BEAT_SECONDS))
        self._failures = 0
        with self._changed:
            if self._failure is not None and not self._closing:
                log.warning("circuit closed")
                self._failure = None

    def _self_test(self) -> Exception | None:
        self._beat = monotonic()
        try:
            self._runtime.warm_up(1)
        except Exception as error:  # graphs raise errors of any class
            if classify(error) == "lost":
                raise DeviceLostError(f"{self._runtime.device} is lost for this process: {error}") from error
            return error
        return None

    def _settle(self, rows: Sequence[Row], resolve: Callable[[Sequence[Resolution]], None]) -> None:
        """Resolve the requests that these rows complete or fail."""
        if any(isinstance(row.result, InferenceResult) for row in rows):
            self._failures = 0
        elif any(isinstance(row.result, Exception) for row in rows):
            self._failures += 1
        resolutions: list[Resolution] = []
        with self._changed:
            for row in rows:
                request = self._owners.pop(row, None)
                if request is None:  # abandoned meanwhile
                    continue
                self._held_runs -= row.job.runs(self._lengths)
                request.missing -= 1
                if isinstance(row.result, Exception):
                    self._release(request)
                    failure = EngineFailed("the model failed on this request")
                    failure.__cause__ = row.result
                    resolutions.append((request, failure))
                elif request.missing == 0:
                    results = [other.result for other in request.rows if isinstance(other.result, InferenceResult)]
                    resolutions.append((request, results))
        resolve(resolutions)
        for _, resolved in resolutions:
            if isinstance(resolved, EngineFailed) and resolved.__cause__ is not None:
                log.error("a graph failed", exception=_trace(resolved.__cause__))

    def _release(self, request: _Request) -> None:
        """Drop a request without a caller; the condition is held. Its rows under refinement leave at the next tick."""
        for row in request.rows:
            row.abandoned = True
            if self._owners.pop(row, None) is not None:
                self._held_runs -= row.job.runs(self._lengths)
        self._waiting = deque(row for row in self._waiting if not row.abandoned)

    def _fail_all(self, failure: EngineFailed) -> None:
        with self._changed:
            calls, self._calls = self._calls, deque()
            requests = set(self._owners.values())
            for request in requests:
                self._release(request)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(failure)
        _post([(request, failure) for request in requests])


def _post(resolutions: Sequence[Resolution]) -> None:
    """Hand them to their event loops in one call each: waking a loop costs as much as a response."""
    for loop in {request.loop for request, _ in resolutions}:
        own = [resolution for resolution in resolutions if resolution[0].loop is loop]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_resolve, own)


def _resolve(resolutions: Sequence[Resolution]) -> None:
    for request, results in resolutions:
        request.resolve(results)


def _trace(error: BaseException) -> str:
    """Without the values of local variables, which some renderers add: they hold what users sent."""
    return "".join(traceback.format_exception(error))
