"""Which rows run together: greedy batches, one refinement step a tick, and errors contained to the row that caused them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from concord.model.codec import count_inputs, is_input
from concord.model.modality import collate
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.device import DeviceLostError, ErrorKind, classify
from concord.service.inference.jobs import InferenceJob, InferenceResult, RefinementResult
from concord.service.inference.refinement import RefinementState, Stream, antithetic, noise, token_noise

RECOVERY_SECONDS = 60.0
TICK_SECONDS = 0.001
"""Longest refinement step while rows without refinement arrive, since they wait until it ends; of one row if that takes longer.
For the CPU, where two photos take as long together as one after the other; a GPU takes as long for one row as for many."""
PRIORITY_SECONDS = 1.0
"""After a row without refinement, more of them are expected for this long."""


@runtime_checkable
class Observer(Protocol):
    """Receives measurements. Called in the thread that runs the graphs: calls must be short and must not raise."""

    def batch(self, size: int) -> None:
        """``size`` rows were encoded together."""

    def stage(self, name: str, seconds: float) -> None:
        """Duration of one run of features (of frozen encoders), encode, refine or generate."""

    def waited(self, seconds: float) -> None:
        """A row left the queue after this time."""

    def refined(self, steps: int, gain: float, stopped: str) -> None:
        """A row's refinement ended: steps taken, nats gained and why it stopped."""

    def failed(self, kind: ErrorKind) -> None:
        """A run of a graph raised an error of this kind."""


class NullObserver:
    """Discards all measurements."""

    def batch(self, size: int) -> None: ...
    def stage(self, name: str, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def refined(self, steps: int, gain: float, stopped: str) -> None: ...
    def failed(self, kind: ErrorKind) -> None: ...


@dataclass(slots=True, eq=False)
class Row:
    """A job on its way through the scheduler."""

    job: InferenceJob
    arrived: float
    """Seconds, monotonic."""
    inputs: Mapping[str, NDArray[Any]] = field(init=False)
    """Arrays of the present modalities, with the features of frozen encoders."""
    abandoned: bool = False
    """The caller is gone. Set from any thread; the row leaves at the next tick."""
    result: InferenceResult | Exception | None = None
    """Set when the row leaves; stays None for abandoned rows."""
    mean: np.ndarray = field(init=False)
    log_var: np.ndarray = field(init=False)
    subset: tuple[str, ...] = ()
    """Rows of equal subset are refined together: its modalities, or () on a device where they do not matter."""
    state: RefinementState | None = None
    slot: int | None = None
    """Its place in the refinement table, from its first step until it leaves."""
    refinement: RefinementResult | None = None
    sample: np.ndarray | None = None
    generated: dict[str, np.ndarray] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue", "features", "encode", "refine", "generate"), 0.0)
    )

    def __post_init__(self) -> None:
        self.inputs = self.job.row


class Scheduler:
    """Rows between the queue and their results. One call at a time.

    Rows without refinement finish in the call to ``add``. The others advance one step per tick in turns, so that a long
    refinement never delays a short one. On a CPU they advance with rows of the same modalities, because a graph skips
    modalities that no row of the batch has; and in small batches while rows without refinement arrive. No result depends on
    the other rows of its batch.

    Args:
        max_batch: rows in one run of a graph, if memory allows.
        max_rows: most rows under refinement at a time.
    """

    def __init__(self, runtime: Runtime, *, max_batch: int, observer: Observer, max_rows: int = 512) -> None:
        self._runtime = runtime
        self._table = runtime.refinement_table(max_rows)
        self._requested = self._allowed = max_batch
        self._raise_at = 0.0
        self._observer = observer
        self._active: deque[Row] = deque()
        self._rows_per_tick: dict[tuple[str, ...], int] = {}  # by subset, as far as known
        self._prioritise_until = 0.0
        self.runs = 0
        """Passes of rows through graphs so far, in the unit of ``InferenceJob.runs``."""

    @property
    def active(self) -> int:
        """Rows under refinement."""
        return len(self._active)

    def warm_up(self) -> None:
        """Run a refinement step at every fixed batch size."""
        self._table.warm_up()

    @property
    def max_batch(self) -> int:
        """Rows in one run. Halved when memory runs out, then doubled every ``RECOVERY_SECONDS``."""
        if self._allowed < self._requested and monotonic() >= self._raise_at:
            self._allowed = min(self._requested, 2 * self._allowed)
            self._raise_at = monotonic() + RECOVERY_SECONDS
        return self._allowed

    def add(self, rows: Sequence[Row]) -> list[Row]:
        """Encode rows together, at most ``max_batch``.

        Returns:
            the rows that are finished, with a result or an error.
        """
        rows = [row for row in rows if not row.abandoned]
        now = monotonic()
        for row in rows:
            row.stage_seconds["queue"] = now - row.arrived
            self._observer.waited(now - row.arrived)
        failed: list[Row] = []
        if self._runtime.encoders:
            frozen = [row for row in rows if any(map(is_input, row.inputs.values()))]
            _, failed = self._isolate("features", self._compute_features, frozen)
            rows = [row for row in rows if row.result is None]
        encoded, more_failed = self._isolate("encode", self._encode, rows)
        unrefined = []
        now = monotonic()
        for row in encoded:
            if row.job.refine.steps > 0:
                start = np.concatenate([row.mean, row.log_var])
                row.state = RefinementState(row.job.refine, start, complete=self._is_complete(row), now=now)
                row.subset = tuple(row.job.row) if self._runtime.device.is_cpu else ()
                self._active.append(row)
            else:
                unrefined.append(row)
                self._prioritise_until = now + PRIORITY_SECONDS
        return failed + more_failed + self._finish(unrefined)

    def step(self) -> list[Row]:
        """One refinement step of the row that waited longest, and of the rows that advance together with it.

        Returns:
            the rows that are finished, with a result or an error.
        """
        began = monotonic()
        rows = self._next_rows(began)
        stepped, failed = self._isolate("refine", self._refine, rows)
        if rows:
            self._measure_tick(rows[0].subset, len(rows), monotonic() - began)
        done = []
        for row in stepped:
            if row.refinement is None:
                self._active.append(row)
            else:
                refined = row.refinement
                self._observer.refined(refined.steps, refined.after - refined.before, refined.stopped)
                done.append(row)
        self._release(failed)
        self._release(done)
        return failed + self._finish(done)

    def _next_rows(self, now: float) -> list[Row]:
        """The row that waited longest for its step, and rows of the same subset up to the batch limit."""
        active: deque[Row] = deque()
        abandoned: list[Row] = []
        for row in self._active:  # once: another thread may abandon a row meanwhile
            (abandoned if row.abandoned else active).append(row)
        self._active = active
        self._release(abandoned)
        if not active:
            return []
        subset, limit = self._active[0].subset, min(self.max_batch, self._runtime.step_rows)
        if now < self._prioritise_until and self._runtime.device.is_cpu:
            limit = min(limit, self._rows_per_tick.get(subset, 1))
        chosen: list[Row] = []
        others: deque[Row] = deque()
        for row in self._active:
            (chosen if len(chosen) < limit and row.subset == subset else others).append(row)
        self._active = others
        return chosen

    def _measure_tick(self, subset: tuple[str, ...], rows: int, seconds: float) -> None:
        """Update how many rows of a subset fit into a step of TICK_SECONDS."""
        if seconds > TICK_SECONDS:
            self._rows_per_tick[subset] = max(1, int(rows * TICK_SECONDS / seconds))
        elif rows >= self._rows_per_tick.get(subset, 1) and seconds < TICK_SECONDS / 2:
            self._rows_per_tick[subset] = 2 * rows

    def _isolate(self, stage: str, run: Callable[[list[Row]], None], rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Run a stage; if it raises, run each half separately, down to the rows that cannot be run.

        This contains an error to the row that causes it, and runs a batch that does not fit into memory in parts.

        Returns:
            the rows that ran, and the rows that failed with their error as ``result``.

        Raises:
            DeviceLostError: no row can run any more.
        """
        if not rows:
            return [], []
        began = monotonic()
        try:
            run(rows)
        except Exception as error:  # graphs raise errors of any class
            if self._kind(error) == "memory" and stage != "generate":  # there the batch counts samples, not rows
                self._reduce_batch(len(rows))
            if len(rows) == 1:
                rows[0].result = error
                return [], rows
            half = len(rows) // 2
            ran, failed = self._isolate(stage, run, rows[:half])
            more_ran, more_failed = self._isolate(stage, run, rows[half:])
            return ran + more_ran, failed + more_failed
        seconds = monotonic() - began
        self._observer.stage(stage, seconds)
        for row in rows:
            row.stage_seconds[stage] += seconds
        return rows, []

    def _compute_features(self, rows: list[Row]) -> None:
        """Run the frozen encoders on the rows that have their inputs."""
        for name in self._runtime.encoders:
            having = [row for row in rows if name in row.job.row and is_input(row.job.row[name])]
            if not having:
                continue
            features = self._runtime.features(name, [row.job.row[name] for row in having])
            self.runs += sum(count_inputs(row.job.row[name]) for row in having)
            for row, feature in zip(having, features, strict=True):
                row.inputs = {**row.inputs, name: feature}

    def _encode(self, rows: list[Row]) -> None:
        inputs, present = collate(self._runtime.modalities, [row.inputs for row in rows])
        posterior = self._runtime.encode(inputs, present)
        self.runs += len(rows)
        if not (np.isfinite(posterior.mean).all() and np.isfinite(posterior.log_var).all()):
            raise FloatingPointError("the encoder returned numbers that are not finite")
        self._observer.batch(len(rows))
        for row, mean, log_var in zip(rows, posterior.mean, posterior.log_var, strict=True):
            row.mean, row.log_var = mean, log_var

    def _refine(self, rows: list[Row]) -> None:
        if new := [row for row in rows if row.slot is None]:
            self._take_slots(new)
        following, objectives = self._runtime.step(self._table, [row.slot for row in rows if row.slot is not None])
        self.runs += len(rows)
        finite = np.isfinite(following).all(axis=1)
        now = monotonic()
        for row, objective, posterior, is_finite in zip(rows, objectives.tolist(), following, finite.tolist(), strict=True):
            state = row.state
            if state is not None and not state.advance(objective, posterior, finite=is_finite, now=now):
                row.mean, row.log_var = np.split(state.best, 2)
                row.refinement = state.result()

    def _take_slots(self, rows: list[Row]) -> None:
        """Write rows into the table. The anchor is the prior for complete rows, else the aligned posterior."""
        inputs, present = collate(self._runtime.modalities, [row.inputs for row in rows])
        start = np.array([row.state.best for row in rows if row.state is not None])
        anchor = start * ~present.all(axis=1, keepdims=True)
        count, latent = self._runtime.noise_samples, self._runtime.latent
        halves = [noise(row.job.seed, row.job.index, Stream.REFINE, (count + 1) // 2, latent) for row in rows]
        eps = antithetic(np.array(halves), count)
        slots = self._table.take(self._runtime.table_rows(inputs, present, start, anchor, eps))
        for row, slot in zip(rows, slots, strict=True):
            row.slot = slot

    def _release(self, rows: Sequence[Row]) -> None:
        self._table.release([row.slot for row in rows if row.slot is not None])
        for row in rows:
            row.slot = None

    def _is_complete(self, row: Row) -> bool:
        return len(row.job.row) == len(self._runtime.modalities)

    def _finish(self, rows: list[Row]) -> list[Row]:
        generating = [row for row in rows if row.job.targets or row.job.sample_embedding]
        self._isolate("generate", self._generate, generating)
        for row in rows:
            if row.result is None:
                row.result = InferenceResult(
                    mean=row.mean,
                    log_var=row.log_var,
                    sample=row.sample,
                    generated=row.generated,
                    refinement=row.refinement,
                    stage_seconds=row.stage_seconds,
                )
        return rows

    def _generate(self, rows: list[Row]) -> None:
        embedding = [row for row in rows if row.job.sample_embedding]
        decoding = [row for row in rows if row.job.targets]
        samples = self._sample(
            [
                *((row, Stream.EMBED, 1, 1.0) for row in embedding),
                *((row, Stream.GENERATE, row.job.num_samples, _temperature(row.job)) for row in decoding),
            ]
        )
        for row, z in zip(embedding, samples, strict=False):
            row.sample = z[0]
        zs = samples[len(embedding) :]
        for number, modality in enumerate(self._runtime.modalities):
            chosen = [index for index, row in enumerate(decoding) if modality.name in row.job.targets]
            if not chosen:
                continue
            z = np.concatenate([zs[index] for index in chosen])
            if modality.name in self._runtime.autoregressive:
                values = self._generate_texts(modality.name, number, [decoding[index].job for index in chosen], z)
                self.runs += values.size  # as many as planned, also if all texts end earlier: jobs in the queue count alike
            else:
                values = self._run_in_parts(partial(self._runtime.decode, modality.name), z)
                self.runs += len(z)
            if np.isnan(values).any():
                raise FloatingPointError(f"the decoder of {modality.name} returned NaN")
            ends = np.cumsum([len(zs[index]) for index in chosen])
            for index, own in zip(chosen, np.split(values, ends[:-1]), strict=True):
                decoding[index].generated[modality.name] = own

    def _generate_texts(self, name: str, number: int, jobs: Sequence[InferenceJob], z: np.ndarray) -> np.ndarray:
        """Token ids (z, length) of a text with the autoregressive likelihood.

        Args:
            number: position of the modality in the bundle.
            z: ``num_samples`` of each job, one job after the other.
        """
        length = self._runtime.autoregressive[name].length
        uniform = np.concatenate([token_noise(job.seed, job.index, number, job.num_samples, length) for job in jobs])
        counts = [job.num_samples for job in jobs]
        temperature = np.repeat(np.array([job.text_temperature for job in jobs], np.float32), counts)
        top_p = np.repeat(np.array([job.top_p for job in jobs], np.float32), counts)
        return self._run_in_parts(partial(self._runtime.sample_text, name), z, uniform, temperature, top_p)

    def _sample(self, wanted: list[tuple[Row, Stream, int, float]]) -> list[np.ndarray]:
        """z = mean + temperature · (a sample of the posterior - mean), by row (count, latent)."""
        counts = [count for _, _, count, _ in wanted]
        mean, log_var = (np.repeat([getattr(row, part) for row, *_ in wanted], counts, axis=0) for part in ("mean", "log_var"))
        if not any(temperature for *_, temperature in wanted):
            return np.split(mean, np.cumsum(counts)[:-1])
        eps = np.concatenate(
            [
                noise(row.job.seed, row.job.index, stream, count, self._runtime.latent)
                if temperature
                else np.zeros((count, self._runtime.latent), np.float32)
                for row, stream, count, temperature in wanted
            ]
        )
        temperature = np.repeat(np.array([temperature for *_, temperature in wanted], np.float32), counts)[:, np.newaxis]
        sampled = self._run_in_parts(lambda m, v, e: self._runtime.sample(Posterior(m, v), e), mean, log_var, eps)
        z = mean + temperature * (sampled - mean)
        if not np.isfinite(z).all():
            raise FloatingPointError("samples of the posterior are not finite")
        return np.split(z, np.cumsum(counts)[:-1])

    def _run_in_parts(self, run: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
        """Run a graph on at most ``max_batch`` rows at a time: one item may request more samples than fit into memory."""
        parts, start, rows = [], 0, len(arrays[0])
        while start < rows:
            end = min(rows, start + self.max_batch)
            try:
                parts.append(run(*(array[start:end] for array in arrays)))
            except Exception as error:
                if end - start == 1 or classify(error) != "memory":
                    raise
                self._observer.failed("memory")
                self._reduce_batch(end - start)
            else:
                start = end
        return np.concatenate(parts)

    def _kind(self, error: Exception) -> ErrorKind:
        """Report an error and return its kind.

        Raises:
            DeviceLostError: it says that the device is lost, and one blank row cannot run either.
        """
        kind = classify(error)
        if kind == "lost":
            try:
                self._runtime.warm_up(1)
            except Exception as second:
                if classify(second) == "lost":
                    self._observer.failed("lost")
                    raise DeviceLostError(f"{self._runtime.device} is lost for this process: {second}") from error
            kind = "other"
        self._observer.failed(kind)
        return kind

    def _reduce_batch(self, rows: int) -> None:
        """``rows`` did not fit into memory."""
        self._allowed = max(1, min(self._allowed, rows // 2))
        self._raise_at = monotonic() + RECOVERY_SECONDS


def _temperature(job: InferenceJob) -> float:
    return job.temperature if job.latent == "sample" else 0.0
