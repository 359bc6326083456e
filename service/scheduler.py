"""Which rows run together: greedy batches, one refinement step a tick, and faults kept to the row that caused them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol, runtime_checkable

import numpy as np

from model.modality import collate
from model.runtime import Posterior, Runtime
from service.refinement import Ascent, Stream, antithetic, noise
from service.work import Outcome, Refinement, Work

RECOVERY_SECONDS = 60.0
TICK_SECONDS = 0.002
"""What a step of refinement may take where rows come that want none: they wait for its end. On a CPU, whose time grows with
the rows; a GPU is as quick with one row as with many."""
HURRY_SECONDS = 1.0
"""After one such row more of them are expected for so long."""


@runtime_checkable
class Observer(Protocol):
    """Who counts. Called in the inference thread: each call must be short and must not raise."""

    def batch(self, size: int) -> None:
        """``size`` rows were encoded together."""

    def stage(self, name: str, seconds: float) -> None:
        """One run of encode, refine or generate took so long."""

    def waited(self, seconds: float) -> None:
        """A row left the queue."""

    def refined(self, refinement: Refinement) -> None:
        """A row's refinement ended."""


class Silent:
    """The observer that counts nothing."""

    def batch(self, size: int) -> None: ...
    def stage(self, name: str, seconds: float) -> None: ...
    def waited(self, seconds: float) -> None: ...
    def refined(self, refinement: Refinement) -> None: ...


@dataclass(slots=True, eq=False)
class Row:
    """A work on its way through the scheduler."""

    work: Work
    arrived: float
    """Seconds, monotonic."""
    abandoned: bool = False
    """Nobody waits any more: set from any thread, the row leaves at the next tick."""
    outcome: Outcome | Exception | None = None
    """Set when the row leaves; None only for abandoned rows."""
    mean: np.ndarray = field(init=False)
    log_var: np.ndarray = field(init=False)
    subset: tuple[str, ...] = ()
    """Whose rows it refines with: its modalities, where that matters."""
    ascent: Ascent | None = None
    refinement: Refinement | None = None
    sample: np.ndarray | None = None
    generated: dict[str, np.ndarray] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("queue", "encode", "refine", "generate"), 0.0))


class Scheduler:
    """Rows between the queue and their outcomes. For one thread.

    Rows without refinement leave in the call that admitted them. The others take their steps in turns, so that a long
    refinement never holds back a short one: on a CPU with rows of the same modalities, for a graph passes over those that no
    row has, and while rows without refinement come with so few that the step is short. No answer depends on a row's neighbours.

    Args:
        max_batch: rows in one run of a graph, where memory allows.
    """

    def __init__(self, runtime: Runtime, *, max_batch: int, observer: Observer) -> None:
        self._runtime = runtime
        self._asked = self._allowed = max_batch
        self._raise_at = 0.0
        self._observer = observer
        self._active: deque[Row] = deque()
        self._quick: dict[tuple[str, ...], int] = {}  # rows of a subset that take a step in TICK_SECONDS, as far as known
        self._hurried_until = 0.0
        self.runs = 0
        """Rows that went through a graph, each time counted."""

    @property
    def active(self) -> int:
        """Rows under refinement."""
        return len(self._active)

    @property
    def max_batch(self) -> int:
        """Rows in one run. Half of what the memory did not hold, then twice as many every ``RECOVERY_SECONDS``."""
        if self._allowed < self._asked and monotonic() >= self._raise_at:
            self._allowed = min(self._asked, 2 * self._allowed)
            self._raise_at = monotonic() + RECOVERY_SECONDS
        return self._allowed

    def admit(self, rows: Sequence[Row]) -> list[Row]:
        """Encode rows together, at most ``max_batch``.

        Returns:
            the rows that are finished, failed or not.
        """
        rows = [row for row in rows if not row.abandoned]
        now = monotonic()
        for row in rows:
            row.timings["queue"] = now - row.arrived
            self._observer.waited(now - row.arrived)
        encoded, left = self._isolate("encode", self._encode, rows)
        unrefined = []
        now = monotonic()
        for row in encoded:
            if row.work.refine.steps > 0:
                row.ascent = self._begin(row, now)
                row.subset = tuple(row.work.row) if self._runtime.device == "cpu" else ()
                self._active.append(row)
            else:
                unrefined.append(row)
                self._hurried_until = now + HURRY_SECONDS
        return left + self._finish(unrefined)

    def step(self) -> list[Row]:
        """One refinement step of the row that waited longest for its own, and of those that take theirs with it.

        Returns:
            the rows that are finished, failed or not.
        """
        began = monotonic()
        turn = self._turn(began)
        stepped, left = self._isolate("refine", self._refine, turn)
        if turn:
            self._learn(turn[0].subset, len(turn), monotonic() - began)
        done = []
        for row in stepped:
            if row.refinement is None:
                self._active.append(row)
            else:
                self._observer.refined(row.refinement)
                done.append(row)
        return left + self._finish(done)

    def _turn(self, now: float) -> list[Row]:
        """The row that waited longest for its step, and those of its subset that take theirs with it."""
        self._active = deque(row for row in self._active if not row.abandoned)
        if not self._active:
            return []
        subset, limit = self._active[0].subset, self.max_batch
        if now < self._hurried_until and self._runtime.device == "cpu":
            limit = min(limit, self._quick.get(subset, 1))
        turn: list[Row] = []
        others: deque[Row] = deque()
        for row in self._active:
            (turn if len(turn) < limit and row.subset == subset else others).append(row)
        self._active = others
        return turn

    def _learn(self, subset: tuple[str, ...], rows: int, seconds: float) -> None:
        """How many rows of a subset take a step in TICK_SECONDS, from how long so many took."""
        if seconds > TICK_SECONDS:
            self._quick[subset] = max(1, int(rows * TICK_SECONDS / seconds))
        elif rows >= self._quick.get(subset, 1) and seconds < TICK_SECONDS / 2:
            self._quick[subset] = 2 * rows

    def _isolate(self, stage: str, run: Callable[[list[Row]], None], rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Run a stage; when it raises, run each half alone, down to the rows that cannot be run.

        This keeps a fault from the neighbours, and lets a batch that is too large for the memory through in parts.

        Returns:
            the rows that ran and those that failed.
        """
        if not rows:
            return [], []
        began = monotonic()
        try:
            run(rows)
        except Exception as error:  # whatever the graphs raise
            if _out_of_memory(error) and stage != "generate":  # whose rows are of another number
                self._lower(len(rows))
            if len(rows) == 1:
                rows[0].outcome = error
                return [], rows
            half = len(rows) // 2
            ran, failed = self._isolate(stage, run, rows[:half])
            more_ran, more_failed = self._isolate(stage, run, rows[half:])
            return ran + more_ran, failed + more_failed
        seconds = monotonic() - began
        self._observer.stage(stage, seconds)
        for row in rows:
            row.timings[stage] += seconds
        return rows, []

    def _encode(self, rows: list[Row]) -> None:
        inputs, present = collate(self._runtime.modalities, [row.work.row for row in rows])
        posterior = self._runtime.encode(inputs, present)
        self.runs += len(rows)
        if not (np.isfinite(posterior.mean).all() and np.isfinite(posterior.log_var).all()):
            raise FloatingPointError("the encoder answered with numbers that are not finite")
        self._observer.batch(len(rows))
        for row, mean, log_var in zip(rows, posterior.mean, posterior.log_var, strict=True):
            row.mean, row.log_var = mean, log_var

    def _begin(self, row: Row, now: float) -> Ascent:
        work, samples = row.work, self._runtime.samples
        half = noise(work.seed, work.index, Stream.REFINE, (samples + 1) // 2, self._runtime.latent)
        return Ascent(
            work.refine,
            row.mean,
            row.log_var,
            complete=len(work.row) == len(self._runtime.modalities),
            noise=antithetic(half, samples),
            now=now,
        )

    def _refine(self, rows: list[Row]) -> None:
        ascents = [row.ascent for row in rows if row.ascent is not None]
        inputs, present = collate(self._runtime.modalities, [row.work.row for row in rows])
        posterior = Posterior(*(np.stack(parts) for parts in zip(*(ascent.posterior for ascent in ascents), strict=True)))
        anchor = Posterior(*(np.stack(parts) for parts in zip(*(ascent.anchor for ascent in ascents), strict=True)))
        following, objectives = self._runtime.refine(
            inputs, present, posterior, anchor, np.stack([ascent.noise for ascent in ascents])
        )
        self.runs += len(rows)
        finite = np.isfinite(following.mean).all(axis=1) & np.isfinite(following.log_var).all(axis=1)
        now = monotonic()
        turns = zip(rows, ascents, objectives.tolist(), following.mean, following.log_var, finite.tolist(), strict=True)
        for row, ascent, objective, mean, log_var, is_finite in turns:
            if not ascent.advance(objective, mean, log_var, finite=is_finite, now=now):
                row.mean, row.log_var = ascent.best
                row.refinement = ascent.refinement()

    def _finish(self, rows: list[Row]) -> list[Row]:
        generating = [row for row in rows if row.work.targets or row.work.sample_embedding]
        self._isolate("generate", self._generate, generating)
        for row in rows:
            if row.outcome is None:
                row.outcome = Outcome(
                    mean=row.mean,
                    log_var=row.log_var,
                    sample=row.sample,
                    generated=row.generated,
                    refinement=row.refinement,
                    timings=row.timings,
                )
        return rows

    def _generate(self, rows: list[Row]) -> None:
        embedding = [row for row in rows if row.work.sample_embedding]
        decoding = [row for row in rows if row.work.targets]
        drawn = self._draw(
            [
                *((row, Stream.EMBED, 1, 1.0) for row in embedding),
                *((row, Stream.GENERATE, row.work.num_samples, _temperature(row.work)) for row in decoding),
            ]
        )
        for row, z in zip(embedding, drawn, strict=False):
            row.sample = z[0]
        zs = drawn[len(embedding) :]
        for modality in self._runtime.modalities:
            chosen = [index for index, row in enumerate(decoding) if modality.name in row.work.targets]
            if not chosen:
                continue
            values = self._decode(modality.name, np.concatenate([zs[index] for index in chosen]))
            if np.isnan(values).any():
                raise FloatingPointError(f"the decoder of {modality.name} answered with numbers that are not finite")
            ends = np.cumsum([len(zs[index]) for index in chosen])
            for index, own in zip(chosen, np.split(values, ends[:-1]), strict=True):
                decoding[index].generated[modality.name] = own

    def _draw(self, wanted: list[tuple[Row, Stream, int, float]]) -> list[np.ndarray]:
        """z = mean + temperature · (a sample of the posterior - mean), of each row (count, latent)."""
        counts = [count for _, _, count, _ in wanted]
        mean, log_var = (np.repeat([getattr(row, part) for row, *_ in wanted], counts, axis=0) for part in ("mean", "log_var"))
        if not any(temperature for *_, temperature in wanted):
            return np.split(mean, np.cumsum(counts)[:-1])
        eps = np.concatenate(
            [
                noise(row.work.seed, row.work.index, stream, count, self._runtime.latent)
                if temperature
                else np.zeros((count, self._runtime.latent), np.float32)
                for row, stream, count, temperature in wanted
            ]
        )
        temperature = np.repeat(np.array([temperature for *_, temperature in wanted], np.float32), counts)[:, np.newaxis]
        z = mean + temperature * (self._runtime.draw(Posterior(mean, log_var), eps) - mean)
        if not np.isfinite(z).all():
            raise FloatingPointError("samples of the posterior are numbers that are not finite")
        return np.split(z, np.cumsum(counts)[:-1])

    def _decode(self, modality: str, z: np.ndarray) -> np.ndarray:
        """In parts, for a row may ask for more samples than fit."""
        parts, start = [], 0
        while start < len(z):
            part = z[start : start + self.max_batch]
            try:
                parts.append(self._runtime.decode(modality, part))
            except Exception as error:
                if len(part) == 1 or not _out_of_memory(error):
                    raise
                self._lower(len(part))
            else:
                start += len(part)
                self.runs += len(part)
        return np.concatenate(parts)

    def _lower(self, rows: int) -> None:
        """So many rows were too many for the memory."""
        self._allowed = max(1, min(self._allowed, rows // 2))
        self._raise_at = monotonic() + RECOVERY_SECONDS


def _temperature(work: Work) -> float:
    return work.temperature if work.latent == "sample" else 0.0


def _out_of_memory(error: Exception) -> bool:
    """ONNX Runtime has no class for it, only words: its own allocator's, and CUDA's."""
    return isinstance(error, MemoryError) or "Failed to allocate" in str(error) or "out of memory" in str(error)
