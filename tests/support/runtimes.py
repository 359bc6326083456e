"""Runtimes that a test controls: it stops inference at a gate, slows it down, or makes it fail."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from concord.model.bundle.manifest import graph_input
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.refinement_table import RefinementTable, table


class GatedRuntime(Runtime):
    """The real graphs. Every run of ``encode`` and ``step`` waits at a gate, which is open at first.

    Attributes:
        encode_gate: while it is closed, the inference thread waits before it encodes.
        refine_gate: while it is closed, the inference thread waits before a refinement step.
        entered: set when a run arrives at a gate.
        before_encode: called with the arguments of ``encode`` after the gate; it may sleep or raise.
        batches: number of rows of each run of ``encode``.
        steps: number of runs of ``step``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encode_gate, self.refine_gate, self.entered = threading.Event(), threading.Event(), threading.Event()
        self.before_encode: Callable[[Any, Any], None] = lambda *_: None
        self.batches: list[int] = []
        self.steps = 0
        self.open()

    def open(self) -> None:
        """Open both gates."""
        self.encode_gate.set()
        self.refine_gate.set()

    def close(self, gate: threading.Event | None = None) -> None:
        """Close a gate, by default that of ``encode``, and forget earlier arrivals."""
        self.entered.clear()
        (gate or self.encode_gate).clear()

    def wait_until_entered(self) -> None:
        assert self.entered.wait(60), "no run arrived at a gate"

    def encode(self, inputs: Any, present: Any) -> Posterior:
        self.batches.append(len(present))
        self._pass(self.encode_gate)
        self.before_encode(inputs, present)
        return super().encode(inputs, present)

    def step(self, *args: Any) -> Any:
        self.steps += 1
        self._pass(self.refine_gate)
        return super().step(*args)

    def _pass(self, gate: threading.Event) -> None:
        self.entered.set()
        assert gate.wait(60), "the test did not open the gate"


def read_rows(runtime: Runtime, held: RefinementTable, slots: Sequence[int]) -> dict[str, np.ndarray]:
    """Return ``present`` and the array of each modality of the rows in some slots of a table."""
    names = {"present": "present", **{m.name: graph_input(m.name) for m in runtime.modalities}}
    return {name: held._tables[table(value)].numpy()[slots] for name, value in names.items()}
