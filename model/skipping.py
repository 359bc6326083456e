"""The encode graph made to compute nothing for rows that lack a modality.

A bundle's graph runs every modality's trunk over every row and then selects. Here the rows that have the modality are picked
out before its trunk and put back behind it, with zeros between, which the selection never reads. Everything stays one graph:
parts of their own would cost more in calls than they save.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

PRESENT = "present"


def skip_absent(content: bytes, modalities: Sequence[str]) -> bytes:
    """The same function of the same inputs. A graph whose trunks cannot be told apart comes back as it was.

    Args:
        content: an ONNX graph with an input for each modality, first axis the batch, and ``present`` (batch, modality).
        modalities: their names, in the order of the columns of ``present``.
    """
    model = onnx.load_model_from_string(content)
    graph = model.graph
    origins = origins_of(graph)
    ends = {name: _end(graph, origins, name) for name in modalities}
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim][1:] for value in inferred}
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    if (
        not all(
            end in shapes and all(shapes[end]) and types[end] == onnx.TensorProto.FLOAT
            for end in ends.values()
            if end is not None
        )
        or None in ends.values()
    ):
        return content
    nodes = []
    for column, name in enumerate(modalities):
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, np.int64), f"{name}/{what}")
            for what, value in (("column", column), ("shape", shapes[ends[name] or ""]))
        )
        nodes += [
            helper.make_node("Gather", [PRESENT, f"{name}/column"], [f"{name}/there"], axis=1),
            helper.make_node("Compress", [name, f"{name}/there"], [f"{name}/rows"], axis=0),
        ]
    for node in graph.node:
        nodes.append(node)
        (origin,) = origins[node.output[0]] if len(origins[node.output[0]]) == 1 else ("",)
        if origin not in ends:
            continue
        end = ends[origin] or ""
        node.input[:] = [f"{origin}/rows" if name == origin else name for name in node.input]
        if end in node.output:
            node.output[:] = [f"{end}/rows" if name == end else name for name in node.output]
            nodes += _put_back(origin, end)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    changed: bytes = model.SerializeToString()
    return changed


def _put_back(name: str, end: str) -> list[onnx.NodeProto]:
    """From the rows that are there to all rows, zeros elsewhere."""
    return [
        helper.make_node("NonZero", [f"{name}/there"], [f"{name}/places"]),
        helper.make_node("Transpose", [f"{name}/places"], [f"{name}/indices"], perm=[1, 0]),
        helper.make_node("Shape", [f"{name}/there"], [f"{name}/batch"]),
        helper.make_node("Concat", [f"{name}/batch", f"{name}/shape"], [f"{name}/whole"], axis=0),
        helper.make_node("ConstantOfShape", [f"{name}/whole"], [f"{name}/zeros"]),
        helper.make_node("ScatterND", [f"{name}/zeros", f"{name}/indices", f"{end}/rows"], [end]),
    ]


def origins_of(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """The graph's inputs that each tensor is computed from."""
    origins = {value.name: frozenset([value.name]) for value in graph.input}
    for node in graph.node:
        found = frozenset().union(*(origins.get(name, frozenset()) for name in node.input))
        origins.update(dict.fromkeys(node.output, found))
    return origins


def _end(graph: onnx.GraphProto, origins: dict[str, frozenset[str]], name: str) -> str | None:
    """The one tensor by which a modality enters what depends on more; None where there are several."""
    own = frozenset([name])
    found = {
        tensor
        for node in graph.node
        if origins[node.output[0]] != own
        for tensor in node.input
        if origins.get(tensor) == own and tensor != name
    }
    straight = any(name in node.input and origins[node.output[0]] != own for node in graph.node)
    return found.pop() if len(found) == 1 and not straight else None
