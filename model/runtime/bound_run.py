"""Runs of a graph on buffers that never move, as CUDA graphs require."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Shaped

from concord.model.runtime.device import Device

Buffers = Mapping[str, onnxruntime.OrtValue]

_graph_ids = itertools.count(1)
"""A CUDA graph is replayed with the addresses that it was captured with, so no two bound runs share an id."""
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_SIZES_FROM_DATA = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators whose outputs have a size that depends on the data."""


def can_capture(content: bytes) -> bool:
    """Whether a graph can run as a CUDA graph: no control flow, and no size that depends on data.

    Source: ONNX Runtime, "CUDA Execution Provider", section on CUDA graphs.
    """
    nodes = onnx.load_model_from_string(content).graph.node
    return not any(node.op_type in _CONTROL_FLOW | _SIZES_FROM_DATA for node in nodes)


def device_array(array: Shaped[np.ndarray, "..."], device: Device) -> onnxruntime.OrtValue:
    """The array in the memory of the device. On a CPU it is the same memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device.kind, device.index)


class BoundRun:
    """A graph at one batch size, with fixed buffers of its inputs and outputs on the device. Not thread-safe.

    Args:
        inputs, outputs: the buffers, by name. One buffer may be an input and an output.
        capture: the first run records a CUDA graph, which the others replay. The session must have been opened for that.
    """

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Buffers, outputs: Buffers, *, capture: bool) -> None:
        self._session, self._inputs, self.outputs = session, inputs, outputs
        self._options: onnxruntime.RunOptions | None = None  # their mere presence costs 25 us a run
        if capture:
            self._options = onnxruntime.RunOptions()
            self._options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))
        self._binding: Any = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self, feed: Mapping[str, Shaped[np.ndarray, "batch ..."]]) -> None:
        """Copy arrays into the buffers of the inputs with their names, and run. The results are in ``outputs``."""
        for name, values in feed.items():
            self._inputs[name].update_inplace(values)
        self._session.run_with_iobinding(self._binding, self._options)
