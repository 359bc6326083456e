"""Graphs at a few fixed batch sizes: a GPU prepares its kernels anew for every size that it has not just run."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from concord.model.runtime.bound_run import BoundRun, device_array
from concord.model.runtime.device import Device

Rows = Shaped[np.ndarray, "batch ..."]


@runtime_checkable
class Session(Protocol):
    """What this module uses of ``onnxruntime.InferenceSession``."""

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, Rows]) -> list[Rows]: ...


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Return 1, 4, 16 and so on below ``largest``, and ``largest`` itself: less than three quarters of a batch is padding."""
    sizes = [1]
    while sizes[-1] * 4 < largest:
        sizes.append(sizes[-1] * 4)
    return tuple(dict.fromkeys((*sizes, largest)))


class FixedBatches:
    """A session that runs at fixed batch sizes only. Rows of a graph do not affect each other, so results stay the same.

    Args:
        session: inputs and outputs have the rows on their first axis.
        sizes: ascending.
        capture_on: a GPU on which the run at each size is captured as a CUDA graph. None: nothing is captured.
    """

    def __init__(self, session: Session, sizes: tuple[int, ...], *, capture_on: Device | None = None) -> None:
        self._session = session
        self.sizes = sizes
        self._capture_on = capture_on
        self._captured: dict[int, BoundRun] = {}
        self._lock = threading.Lock()  # of the buffers of captured runs
        self.runs: Counter[int] = Counter()
        """Number of runs by batch size."""
        self.padding = 0
        """Rows that were added in all runs."""

    def count(self, rows: int) -> int:
        """Count a run of so many rows, and return the smallest size that fits them."""
        size = next(size for size in self.sizes if size >= rows)
        self.runs[size] += 1
        self.padding += size - rows
        return size

    def run(self, outputs: Sequence[str], feed: Mapping[str, Rows]) -> list[Rows]:
        """Run rows in batches of the largest size, and the last ones in the smallest size that fits, padded.

        Args:
            feed: at least one row.
        """
        rows, largest = len(next(iter(feed.values()))), self.sizes[-1]
        parts = [
            self._run({name: values[start : start + largest] for name, values in feed.items()}, outputs)
            for start in range(0, rows, largest)
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _run(self, feed: Mapping[str, Rows], outputs: Sequence[str]) -> list[Rows]:
        rows = len(next(iter(feed.values())))
        size = self.count(rows)
        if size > rows:
            # Copies of the first row, which is valid as every row is: zeros would be a row without any modality.
            feed = {name: np.concatenate([values, np.repeat(values[:1], size - rows, axis=0)]) for name, values in feed.items()}
        results = self._session.run(outputs, feed) if self._capture_on is None else self._run_captured(size, feed, outputs)
        return results if size == rows else [values[:rows] for values in results]

    def _run_captured(self, size: int, feed: Mapping[str, Rows], outputs: Sequence[str]) -> list[Rows]:
        with self._lock:
            if size not in self._captured:
                self._captured[size] = self._capture(size, feed)
            run = self._captured[size]
            run(feed)
            return [run.outputs[name].numpy().copy() for name in outputs]  # the next run overwrites them

    def _capture(self, size: int, feed: Mapping[str, Rows]) -> BoundRun:
        assert self._capture_on is not None
        session: Any = self._session
        inputs = {name: device_array(values.copy(), self._capture_on) for name, values in feed.items()}
        outputs = {
            value.name: device_array(np.zeros((size, *value.shape[1:]), np.float32), self._capture_on)
            for value in session.get_outputs()
        }
        return BoundRun(session, inputs, outputs, capture=True)
