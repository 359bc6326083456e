"""Graph pass over the encode graph: run each modality's encoder trunk only for the rows that have the modality.

The encode graph of a bundle runs every trunk on every row and then selects with ``present``. This pass gathers the rows that
have the modality before the trunk and scatters the results after it. The other rows get zeros, which the selection discards.
The result is still one graph, because separate graphs would cost more in calls than they save. See README.md in this folder.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

PRESENT = "present"


def skip_absent(content: bytes, modalities: Sequence[str]) -> bytes:
    """The encode graph with skipped rows; same inputs, same outputs.

    Args:
        content: an ONNX graph with one input per modality, whose first axis is the batch, and ``present`` (batch, modality).
        modalities: names of their inputs in the order of the columns of ``present``.

    Returns:
        the changed graph; ``content`` unchanged if a modality does not enter the rest of the graph through exactly one float
        tensor of known shape.
    """
    model = onnx.load_model_from_string(content)
    graph = model.graph
    origins = input_dependencies(graph)
    trunk_outputs = {name: _trunk_output(graph, origins, name) for name in modalities}
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim][1:] for value in inferred}
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    if (
        not all(
            output in shapes and all(shapes[output]) and types[output] == onnx.TensorProto.FLOAT
            for output in trunk_outputs.values()
            if output is not None
        )
        or None in trunk_outputs.values()
    ):
        return content
    nodes = []
    for column, name in enumerate(modalities):
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, np.int64), f"{name}/{label}")
            for label, value in (("column", column), ("shape", shapes[trunk_outputs[name] or ""]))
        )
        nodes += [
            helper.make_node("Gather", [PRESENT, f"{name}/column"], [f"{name}/mask"], axis=1),
            helper.make_node("Compress", [name, f"{name}/mask"], [f"{name}/rows"], axis=0),
        ]
    for node in graph.node:
        nodes.append(node)
        (origin,) = origins[node.output[0]] if len(origins[node.output[0]]) == 1 else ("",)
        if origin not in trunk_outputs:
            continue
        output = trunk_outputs[origin] or ""
        node.input[:] = [f"{origin}/rows" if name == origin else name for name in node.input]
        if output in node.output:
            node.output[:] = [f"{output}/rows" if name == output else name for name in node.output]
            nodes += _scatter_rows(origin, output)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    changed: bytes = model.SerializeToString()
    return changed


def input_dependencies(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """For each tensor the names of the graph's inputs that it is computed from."""
    origins = {value.name: frozenset([value.name]) for value in graph.input}
    for node in graph.node:
        inputs = frozenset().union(*(origins.get(name, frozenset()) for name in node.input))
        origins.update(dict.fromkeys(node.output, inputs))
    return origins


def _trunk_output(graph: onnx.GraphProto, origins: dict[str, frozenset[str]], name: str) -> str | None:
    """The only tensor through which a modality enters nodes that depend on other inputs too. None if there is not exactly one,
    or if the input itself enters them."""
    trunk = frozenset([name])
    outputs = {
        tensor
        for node in graph.node
        if origins[node.output[0]] != trunk
        for tensor in node.input
        if origins.get(tensor) == trunk and tensor != name
    }
    bypasses_trunk = any(name in node.input and origins[node.output[0]] != trunk for node in graph.node)
    return outputs.pop() if len(outputs) == 1 and not bypasses_trunk else None


def _scatter_rows(name: str, output: str) -> list[onnx.NodeProto]:
    """Nodes that write the rows of ``{output}/rows`` to their places in ``output`` (batch, ...), zeros elsewhere."""
    return [
        helper.make_node("NonZero", [f"{name}/mask"], [f"{name}/row_numbers"]),
        helper.make_node("Transpose", [f"{name}/row_numbers"], [f"{name}/indices"], perm=[1, 0]),
        helper.make_node("Shape", [f"{name}/mask"], [f"{name}/batch"]),
        helper.make_node("Concat", [f"{name}/batch", f"{name}/shape"], [f"{name}/full_shape"], axis=0),
        helper.make_node("ConstantOfShape", [f"{name}/full_shape"], [f"{name}/zeros"]),
        helper.make_node("ScatterND", [f"{name}/zeros", f"{name}/indices", f"{output}/rows"], [output]),
    ]
