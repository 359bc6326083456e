"""Graph pass over the refine graph: skip the decoders of modalities that no row of the batch has.

The refine graph of a bundle runs every decoder, forward and backward, for every row and then selects with ``present``. This
pass moves all nodes that belong to one modality, its log-likelihood and the gradient of it, into a branch of an ``If``. The
branch runs if at least one row has the modality. Otherwise zeros take its place, as the selection would give. A batch of rows
that have only a word then costs the word's decoder only. See README.md in this folder.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from concord.model.runtime.skip_absent import PRESENT, input_dependencies

NOISE = "noise"
MAX_WEIGHT_BYTES = 1 << 30
"""Largest weights that are moved into a graph. Protocol Buffers can hold twice that."""
CONVOLUTION_AXES = 3
"""Fewest axes of the weights of a convolution. ONNX Runtime changes their layout, for a faster kernel, only where they are
constants of the same branch. All others stay outside: it keeps those of a branch three times."""

_Shapes = Mapping[str, list[str | int]]


def branch_absent(content: bytes, weights: bytes, modalities: Sequence[str]) -> bytes:
    """The refine graph with one branch per modality; same inputs, same outputs.

    Args:
        content: an ONNX graph with one input per modality, ``present`` (batch, modality) and ``noise`` (batch, sample, latent).
        weights: content of the file that holds the graph's external tensors. Those of convolutions move into the branches.
        modalities: names of their inputs in the order of the columns of ``present``.

    Returns:
        the changed graph; ``content`` unchanged if the nodes of the modalities cannot be separated, or if the weights are
        larger than ``MAX_WEIGHT_BYTES``.
    """
    if len(weights) > MAX_WEIGHT_BYTES:
        return content
    model = onnx.load_model_from_string(content)
    graph = model.graph
    shapes = _infer_shapes(model)
    _take_sizes_from_noise(graph, shapes)
    convolutions = {tensor.name for tensor in graph.initializer if len(tensor.dims) >= CONVOLUTION_AXES}
    owners = _owning_modalities(graph, modalities, convolutions)
    consumers = _consumers(graph)
    graph_outputs = {value.name for value in graph.output}
    branch_outputs = {
        name: [
            tensor
            for index, node in enumerate(graph.node)
            if owners.get(index) == name
            for tensor in node.output
            if tensor in graph_outputs or any(owners.get(consumer) != name for consumer in consumers.get(tensor, ()))
        ]
        for name in modalities
    }
    if not all(branch_outputs.values()) or any(
        _noise_rank(tensor, shapes) is None or tensor in graph_outputs
        for outputs in branch_outputs.values()
        for tensor in outputs
    ):
        return content
    branch_initializers = {  # weights of convolutions that only one modality uses
        name: next(iter(users))
        for name in convolutions
        if len(users := {owners.get(consumer) for consumer in consumers.get(name, ())}) == 1 and None not in users
    }
    for tensor in graph.initializer:
        if tensor.name in branch_initializers:
            _inline_weights(tensor, weights)
    nodes = [node for index, node in enumerate(graph.node) if index not in owners]
    nodes += [
        helper.make_node("Cast", [PRESENT], [f"{PRESENT}/int"], to=onnx.TensorProto.INT32),
        helper.make_node("ReduceMax", [f"{PRESENT}/int", f"{PRESENT}/batch_axis"], [f"{PRESENT}/any"], keepdims=0),
    ]
    constants: dict[str, int | list[int]] = {f"{PRESENT}/batch_axis": [0], f"{PRESENT}/one": [1]}
    for column, name in enumerate(modalities):
        constants[f"{name}/column"] = column
        body = [node for index, node in enumerate(graph.node) if owners.get(index) == name]
        initializers = [tensor for tensor in graph.initializer if branch_initializers.get(tensor.name) == name]
        nodes += _branch(name, body, initializers, branch_outputs[name], shapes)
    shared = [tensor for tensor in graph.initializer if tensor.name not in branch_initializers]
    shared += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]
    ordered = _topological_order(nodes, {tensor.name for tensor in shared} | {value.name for value in graph.input})
    if ordered is None:
        return content
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(ordered)
    graph.initializer.extend(shared)
    changed: bytes = model.SerializeToString()
    return changed


def _infer_shapes(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    """Axes of each tensor: a number, or a name for the batch."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }


def _take_sizes_from_noise(graph: onnx.GraphProto, shapes: _Shapes) -> None:
    """Let ``Shape`` nodes read the noise if it has the same leading axes.

    The backward pass starts with ones of the objective's shape. Without this change it would depend on the log-likelihood of
    every modality, and no node would belong to one modality.
    """
    for node in graph.node:
        axes = shapes.get(node.input[0]) if node.op_type == "Shape" else None
        if axes and axes == shapes[NOISE][: len(axes)] and all(a.name == "start" and a.i == 0 for a in node.attribute):
            node.input[0] = NOISE
            del node.attribute[:]
            node.attribute.extend([helper.make_attribute("start", 0), helper.make_attribute("end", len(axes))])


def _owning_modalities(graph: onnx.GraphProto, modalities: Sequence[str], convolutions: set[str]) -> dict[int, str]:
    """The modality of each node, by node index, that belongs to exactly one: the node depends on this modality and no other, or
    it depends on none and only nodes of this modality read it. A node that reads constants only, such as a transposed weight,
    belongs to none, so that ONNX Runtime computes it once. Those that read ``convolutions`` stay next to them."""
    dependencies = input_dependencies(graph)
    origins = {tensor: inputs & frozenset(modalities) for tensor, inputs in dependencies.items()}
    owners: dict[int, str] = {}
    for index, node in enumerate(graph.node):
        if len(inputs := origins[node.output[0]]) == 1:
            (owners[index],) = inputs
    consumers = _consumers(graph)
    for index, node in reversed(list(enumerate(graph.node))):
        if not dependencies[node.output[0]] and convolutions.isdisjoint(node.input):
            continue
        users = {owners.get(consumer) for tensor in node.output for consumer in consumers.get(tensor, ())}
        if not origins[node.output[0]] and len(users) == 1 and (name := users.pop()) is not None:
            owners[index] = name
    return owners


def _consumers(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Indices of the nodes that read each tensor."""
    consumers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            consumers.setdefault(name, []).append(index)
    return consumers


def _noise_rank(tensor: str, shapes: _Shapes) -> int | None:
    """Number of leading axes that a tensor shares with the noise, if all other axes have size 1. None for any other shape."""
    axes = shapes.get(tensor, [])
    rank = next((i for i, (a, b) in enumerate(zip(axes, shapes[NOISE], strict=False)) if a != b), min(len(axes), 3))
    return rank if rank and all(axis == 1 for axis in axes[rank:]) else None


def _branch(
    name: str,
    body: Iterable[onnx.NodeProto],
    initializers: Iterable[onnx.TensorProto],
    outputs: Sequence[str],
    shapes: _Shapes,
) -> list[onnx.NodeProto]:
    """Nodes that compute ``outputs`` with ``body`` if any row has the modality, and fill them with zeros otherwise."""
    computed = {output: f"{output}/computed" for output in outputs}
    then_nodes = []
    for node in body:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [computed.get(tensor, tensor) for tensor in node.input]
        copy.output[:] = [computed.get(tensor, tensor) for tensor in node.output]
        then_nodes.append(copy)
    else_nodes: list[onnx.NodeProto] = []
    for output in outputs:
        rank = _noise_rank(output, shapes) or 0
        ones = [f"{PRESENT}/one"] * (len(shapes[output]) - rank)
        else_nodes += [
            helper.make_node("Shape", [NOISE], [f"{output}/noise_axes"], start=0, end=rank),
            helper.make_node("Concat", [f"{output}/noise_axes", *ones], [f"{output}/shape"], axis=0),
            helper.make_node("ConstantOfShape", [f"{output}/shape"], [f"{output}/zeros"]),
        ]
    branches = {
        "then_branch": helper.make_graph(then_nodes, f"{name}/then", [], _untyped(computed.values()), list(initializers)),
        "else_branch": helper.make_graph(else_nodes, f"{name}/else", [], _untyped(f"{output}/zeros" for output in outputs)),
    }
    return [
        helper.make_node("Gather", [f"{PRESENT}/any", f"{name}/column"], [f"{name}/any"], axis=0),
        helper.make_node("Cast", [f"{name}/any"], [f"{name}/condition"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", [f"{name}/condition"], list(outputs), **branches),
    ]


def _untyped(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]


def _inline_weights(tensor: onnx.TensorProto, weights: bytes) -> None:
    """Copy the values of an external tensor from the weights file into the graph."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        location = {entry.key: entry.value for entry in tensor.external_data}
        begin = int(location["offset"])
        tensor.raw_data = weights[begin : begin + int(location["length"])]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _topological_order(nodes: Sequence[onnx.NodeProto], available: set[str]) -> list[onnx.NodeProto] | None:
    """The nodes ordered so that each comes after the nodes it reads from. None if there is a cycle.

    Args:
        available: tensors that exist before the first node runs.
    """
    ordered: list[onnx.NodeProto] = []
    waiting = [(node, _inputs_of(node)) for node in nodes]
    while waiting:
        ready = [node for node, inputs in waiting if inputs <= available]
        if not ready:
            return None
        waiting = [(node, inputs) for node, inputs in waiting if not inputs <= available]
        available = available.union(*(node.output for node in ready))
        ordered += ready
    return ordered


def _inputs_of(node: onnx.NodeProto) -> set[str]:
    """Tensors that a node reads, including those that its branches read from the outer graph."""
    inputs = {name for name in node.input if name}
    for attribute in node.attribute:
        captured = {name for inner in attribute.g.node for name in _inputs_of(inner)}
        captured -= {name for inner in attribute.g.node for name in inner.output}
        inputs |= captured - {tensor.name for tensor in attribute.g.initializer}
    return inputs
