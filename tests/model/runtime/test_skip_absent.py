"""Graph pass ``skip_absent``: the outputs stay the same, and trunks run only on rows that have their modality."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from concord.model import bundle
from concord.model.runtime.skip_absent import skip_absent

ROWS = 15


@pytest.fixture(scope="module")
def encode(tiny_bundle: bundle.Bundle) -> bytes:
    return tiny_bundle.content(tiny_bundle.manifest.graphs.encode)


@pytest.fixture(scope="module")
def names(tiny_bundle: bundle.Bundle) -> list[str]:
    return [m.name for m in tiny_bundle.manifest.modalities]


def run(opened: bundle.Bundle, content: bytes, feed: dict[str, Any], outputs: list[str]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    weights = opened.content(bundle.WEIGHTS)
    options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(outputs, feed)


def feed(make_rows: Any, opened: bundle.Bundle, present: np.ndarray) -> dict[str, Any]:
    inputs = make_rows(opened.manifest.modalities, len(present))
    return {**{name: values.numpy() for name, values in inputs.items()}, "present": present}


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("subset", ["mixed", 0, 1, 2, 3, "all"])
def test_skip_absent_outputs_stay_the_same(
    tiny_bundle: bundle.Bundle, encode: bytes, names: list[str], make_rows: Any, rows: int, subset: int | str
) -> None:
    codes = np.arange(1, rows + 1) if subset == "mixed" else np.full(rows, 15 if subset == "all" else 2 ** int(subset))
    inputs = feed(make_rows, tiny_bundle, (codes[:, None] >> np.arange(4) & 1).astype(bool))
    outputs = ["mean", "log_var"]
    for expected, actual in zip(
        run(tiny_bundle, encode, inputs, outputs), run(tiny_bundle, skip_absent(encode, names), inputs, outputs), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_skip_absent_trunk_reads_only_rows_with_its_modality(
    tiny_bundle: bundle.Bundle, encode: bytes, names: list[str], make_rows: Any
) -> None:
    model = onnx.load_model_from_string(skip_absent(encode, names))
    trunk_inputs = [f"{name}/rows" for name in names]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in trunk_inputs)
    present = np.zeros((ROWS, 4), dtype=bool)
    present[:3, 0] = present[:, 1] = present[7, 2] = True
    inputs = feed(make_rows, tiny_bundle, present)
    rows = run(tiny_bundle, model.SerializeToString(), inputs, trunk_inputs)
    assert [len(values) for values in rows] == [3, ROWS, 1, 0]
    np.testing.assert_array_equal(rows[2][0], inputs[names[2]][7])


@pytest.mark.parametrize("two_outputs", [True, False])
def test_skip_absent_inseparable_trunk_returns_the_graph_unchanged(two_outputs: bool) -> None:
    """The trunk has two outputs, or the input itself enters the rest of the graph."""
    name = "x.negated" if two_outputs else "x"
    nodes = [
        helper.make_node("Neg", ["x"], ["x.negated"]),
        helper.make_node("Abs", ["x"], ["x.absolute"]),
        helper.make_node("Cast", ["present"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["mask", name], ["product"]),
        helper.make_node("Mul", ["product", "x.absolute"], ["mean"]),
    ]
    tensors = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])]
    tensors.append(helper.make_tensor_value_info("present", TensorProto.BOOL, ["batch", 1]))
    output = helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", 1])
    content = helper.make_model(helper.make_graph(nodes, "graph", tensors, [output])).SerializeToString()
    assert skip_absent(content, ["x"]) == content
