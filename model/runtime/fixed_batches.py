"""Graphs at a few fixed batch sizes: a GPU prepares its kernels anew for every size that it has not just run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

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
    """

    def __init__(self, session: Session, sizes: tuple[int, ...]) -> None:
        self._session = session
        self._sizes = sizes
        self.runs: Counter[int] = Counter()
        """Number of runs by batch size."""
        self.padding = 0
        """Rows that were added in all runs."""

    def run(self, outputs: Sequence[str], feed: Mapping[str, Rows]) -> list[Rows]:
        """Run rows in batches of the largest size, and the last ones in the smallest size that fits, padded.

        Args:
            feed: at least one row.
        """
        rows, largest = len(next(iter(feed.values()))), self._sizes[-1]
        parts = [
            self._run({name: values[start : start + largest] for name, values in feed.items()}, outputs)
            for start in range(0, rows, largest)
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _run(self, feed: Mapping[str, Rows], outputs: Sequence[str]) -> list[Rows]:
        rows = len(next(iter(feed.values())))
        size = next(size for size in self._sizes if size >= rows)
        self.runs[size] += 1
        if size == rows:
            return self._session.run(outputs, feed)
        self.padding += size - rows
        # Copies of the first row, which is valid as every row is: zeros would be a row without any modality.
        padded = {name: np.concatenate([values, np.repeat(values[:1], size - rows, axis=0)]) for name, values in feed.items()}
        return [values[:rows] for values in self._session.run(outputs, padded)]
