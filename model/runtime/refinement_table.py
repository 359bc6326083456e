"""Rows under refinement in tables that never move: a step sends slot numbers to the device, and no row.

A table holds one array of many rows, such as a modality or the noise, on the device. A row occupies the same slot, an index of
the first axis, in all tables. It is written there once. See README.md in this folder.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float32, Shaped
from onnx import TensorProto, helper, numpy_helper

from concord.model.runtime.bound_run import BoundRun, device_array
from concord.model.runtime.device import Device
from concord.model.runtime.fixed_batches import FixedBatches

SLOTS = "step/slots"
POSTERIOR = "step/posterior"
"""Table of mean and log variance, (slot, 2 · latent). The only one that a step changes."""
ANCHOR = "step/anchor"
"""Table of the anchor's mean and log variance, (slot, 2 · latent)."""
NEXT_POSTERIOR = "step/next_posterior"
RESULT = "step/result"
"""What the host needs of a step: next mean, next log variance and objective, (batch, 2 · latent + 1)."""
Rows = Mapping[str, Shaped[np.ndarray, "batch ..."]]
"""Arrays of some rows, by name of their table."""
_Write = Callable[[Sequence[int], Rows], None]
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def table(name: str) -> str:
    """Name of the table of an input of the refine graph."""
    return f"table/{name}"


def with_tables(content: bytes) -> bytes:
    """The refine graph, reading its rows from tables.

    Inputs: ``SLOTS`` (batch,), ``POSTERIOR``, ``ANCHOR`` and the table of every other input. Outputs: ``RESULT``, and
    ``NEXT_POSTERIOR``, which is ``POSTERIOR`` with the rows of the slots replaced. A caller binds both to the same memory. That
    is safe because the replacement is the last node: it needs ``RESULT``, which needs all others. A run that fails has changed
    nothing.

    Args:
        content: an ONNX graph with the inputs and outputs of ``export.graphs.refine_graph``.
    """
    model = onnx.load_model_from_string(content)
    graph = model.graph
    latent = next(value for value in graph.input if value.name == "mean").type.tensor_type.shape.dim[1].dim_value
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    inputs, before = [helper.make_tensor_value_info(SLOTS, TensorProto.INT64, [batch])], []
    for name, parts in ((POSTERIOR, ("mean", "log_var")), (ANCHOR, ("anchor_mean", "anchor_log_var"))):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["slot", 2 * latent]))
        before.append(helper.make_node("Gather", [name, SLOTS], [f"{name}/rows"], axis=0))
        before.append(helper.make_node("Split", [f"{name}/rows", "step/halves"], parts, axis=1))
    made = {output for node in before for output in node.output}
    for value in graph.input:
        if value.name not in made:
            copy = onnx.ValueInfoProto()
            copy.CopyFrom(value)
            copy.name = table(value.name)
            copy.type.tensor_type.shape.dim[0].dim_param = "slot"
            inputs.append(copy)
            before.append(helper.make_node("Gather", [copy.name, SLOTS], [value.name], axis=0))
    after = [
        helper.make_node("Unsqueeze", ["objective", "step/one"], ["step/objective"]),
        helper.make_node("Concat", ["next_mean", "next_log_var", "step/objective"], [RESULT], axis=1),
        helper.make_node("Slice", [RESULT, "step/zero", "step/width", "step/one"], ["step/rows"]),
        helper.make_node("Unsqueeze", [SLOTS, "step/one"], ["step/indices"]),
        helper.make_node("ScatterND", [POSTERIOR, "step/indices", "step/rows"], [NEXT_POSTERIOR]),
    ]
    constants = {"halves": [latent, latent], "zero": [0], "width": [2 * latent], "one": [1]}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), f"step/{name}") for name, value in constants.items()
    )
    nodes = [*before, *graph.node, *after]
    outputs = [
        helper.make_tensor_value_info(RESULT, TensorProto.FLOAT, [batch, 2 * latent + 1]),
        helper.make_tensor_value_info(NEXT_POSTERIOR, TensorProto.FLOAT, ["slot", 2 * latent]),
    ]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    changed: bytes = model.SerializeToString()
    return changed


class RefinementTable:
    """Rows under refinement. For one thread, to which the CUDA graphs belong that it captures.

    Args:
        session: of a refine graph ``with_tables``.
        capacity: rows that can be held at a time.
        fixed: the graph's fixed batch sizes; None if it runs at any size.
        capture: record the run at each fixed size as a CUDA graph.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: Device,
        capacity: int,
        fixed: FixedBatches | None = None,
        *,
        capture: bool = False,
    ) -> None:
        self._session, self._device, self._fixed, self._capture = session, device, fixed, capture
        values = [value for value in session.get_inputs() if value.name != SLOTS]
        # One slot more than the capacity: that of padding rows, which has all modalities and zeros for numbers.
        self._padding = capacity
        arrays = {value.name: np.zeros((capacity + 1, *value.shape[1:]), _DTYPES[value.type]) for value in values}
        arrays[table("present")][self._padding] = True
        self._tables = {name: device_array(array, device) for name, array in arrays.items()}
        # On a CPU the tables are the arrays. On a GPU a graph writes the rows, since no call of ONNX Runtime writes a part.
        self._write = _write_array(arrays) if device.is_cpu else _write_on_device(self._tables, device)
        self._free = list(range(capacity - 1, -1, -1))
        self._runs: dict[int, BoundRun] = {}

    @property
    def free(self) -> int:
        """Slots without a row."""
        return len(self._free)

    def take(self, rows: Rows) -> list[int]:
        """Write rows into free slots, and return these.

        Args:
            rows: of every table, at least one row.

        Raises:
            RuntimeError: there are fewer free slots. None is taken then, or if the device raises another error.
        """
        count = len(rows[POSTERIOR])
        if count > len(self._free):
            raise RuntimeError(f"{count} rows need slots, and {len(self._free)} are free: refine fewer rows at a time")
        slots = self._free[-count:]
        self._write(slots, rows)
        del self._free[-count:]
        return slots

    def release(self, slots: Sequence[int]) -> None:
        """Free slots that ``take`` returned."""
        self._free += slots

    def step(self, slots: Sequence[int]) -> tuple[Float32[np.ndarray, "batch parameters"], Float32[np.ndarray, " batch"]]:
        """One refinement step of the rows in these slots, in as many runs as fixed batch sizes require.

        A run that raises has changed none of its rows; the runs before it have changed theirs.

        Args:
            slots: at least one.

        Returns:
            the next posteriors, mean and log variance in one row, (batch, 2 · latent), and the objectives of the posteriors
            before the step, (batch,).
        """
        largest = len(slots) if self._fixed is None else self._fixed.sizes[-1]
        parts = [self._step(slots[start : start + largest]) for start in range(0, len(slots), largest)]
        result = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return result[:, :-1], result[:, -1]

    def _step(self, slots: Sequence[int]) -> Float32[np.ndarray, "batch result"]:
        count = len(slots)
        size = count if self._fixed is None else self._fixed.count(count)
        run = self._runs.get(size)
        if run is None:
            run = self._runs[size] = self._bind(size)
        run({SLOTS: np.array([*slots, *[self._padding] * (size - count)], np.int64)})
        return np.array(run.outputs[RESULT].numpy()[:count])  # a copy: the next run overwrites the buffer

    def warm_up(self) -> None:
        """Run every fixed batch size once, on padding rows."""
        for size in () if self._fixed is None else self._fixed.sizes:
            if size not in self._runs:
                self._runs[size] = self._bind(size)

    def _bind(self, size: int) -> BoundRun:
        width = self._tables[POSTERIOR].shape()[1] + 1
        inputs = {**self._tables, SLOTS: device_array(np.full(size, self._padding), self._device)}
        result = device_array(np.zeros((size, width), np.float32), self._device)
        outputs = {RESULT: result, NEXT_POSTERIOR: self._tables[POSTERIOR]}
        run = BoundRun(self._session, inputs, outputs, capture=self._capture)
        if self._fixed is not None:
            run({})  # on padding rows: the run that captures a graph executes it several times, each time a step
        return run


def _write_array(arrays: Mapping[str, Shaped[np.ndarray, "slot ..."]]) -> _Write:
    """Return a function that writes rows into arrays."""

    def write(slots: Sequence[int], rows: Rows) -> None:
        for name, values in rows.items():
            arrays[name][slots] = values

    return write


def _write_on_device(tables: Mapping[str, onnxruntime.OrtValue], device: Device) -> _Write:
    """Return a function that writes rows into tables on a device, with a graph whose outputs are its inputs."""
    inputs = [helper.make_tensor_value_info(SLOTS, TensorProto.INT64, ["batch", 1])]
    outputs, nodes = [], []
    for name, value in tables.items():
        dtype, shape = value.element_type(), value.shape()[1:]
        inputs.append(helper.make_tensor_value_info(name, dtype, ["slot", *shape]))
        inputs.append(helper.make_tensor_value_info(f"{name}/rows", dtype, ["batch", *shape]))
        outputs.append(helper.make_tensor_value_info(f"{name}/written", dtype, ["slot", *shape]))
        nodes.append(helper.make_node("ScatterND", [name, SLOTS, f"{name}/rows"], [f"{name}/written"]))
    graph = helper.make_graph(nodes, "write", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=device.providers, enable_fallback=0)
    binding = session.io_binding()
    for name, value in tables.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"{name}/written", value)

    def write(slots: Sequence[int], rows: Rows) -> None:
        binding.bind_cpu_input(SLOTS, np.array(slots, np.int64)[:, np.newaxis])
        for name, values in rows.items():
            binding.bind_cpu_input(f"{name}/rows", values)
        session.run_with_iobinding(binding)

    return write
