"""The refine graph made to pass over modalities that no row of a batch has.

A bundle's graph decodes every modality for every row, there and back, and then selects. Here all that leads to what one
modality contributes, its evidence and the slope of that, is a branch of its own, taken where some row has the modality;
elsewhere there are zeros in its place, which is what the selection makes of it. One observed word then costs a word's decoder.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from model.skipping import PRESENT, origins_of

NOISE = "noise"
MOST_BYTES = 1 << 30
"""Of weights that move into a graph: Protocol Buffers hold twice that."""


def branch_absent(content: bytes, weights: bytes, modalities: Sequence[str]) -> bytes:
    """The same function of the same inputs. A graph whose modalities cannot be told apart, or with more than ``MOST_BYTES`` of
    weights, comes back as it was.

    Args:
        content: an ONNX graph with an input for each modality, ``present`` (batch, modality) and ``noise`` (batch, sample,
            latent).
        weights: the file that the graph's external tensors lie in. They move into the graph: ONNX Runtime takes those of a
            branch from nowhere else.
        modalities: their names, in the order of the columns of ``present``.
    """
    if len(weights) > MOST_BYTES:
        return content
    model = onnx.load_model_from_string(content)
    graph = model.graph
    shapes = _shapes(model)
    _measure_noise_instead(graph, shapes)
    parts = _parts(graph, modalities)
    readers = _readers(graph)
    outputs = {value.name for value in graph.output}
    ends = {
        name: [
            tensor
            for index, node in enumerate(graph.node)
            if parts.get(index) == name
            for tensor in node.output
            if tensor in outputs or any(parts.get(reader) != name for reader in readers.get(tensor, ()))
        ]
        for name in modalities
    }
    if not all(ends.values()) or any(_rank(end, shapes) is None or end in outputs for of in ends.values() for end in of):
        return content
    own = {  # initializers of one part alone
        tensor.name: next(iter(found))
        for tensor in graph.initializer
        if len(found := {parts.get(reader) for reader in readers.get(tensor.name, ())}) == 1 and None not in found
    }
    for tensor in graph.initializer:
        _bring_in(tensor, weights)
    nodes = [node for index, node in enumerate(graph.node) if index not in parts]
    nodes += [
        helper.make_node("Cast", [PRESENT], [f"{PRESENT}/numbers"], to=onnx.TensorProto.INT32),
        helper.make_node("ReduceMax", [f"{PRESENT}/numbers", f"{PRESENT}/rows"], [f"{PRESENT}/some"], keepdims=0),
    ]
    constants: dict[str, int | list[int]] = {f"{PRESENT}/rows": [0], f"{PRESENT}/one": [1]}
    for column, name in enumerate(modalities):
        constants[f"{name}/column"] = column
        body = [node for index, node in enumerate(graph.node) if parts.get(index) == name]
        held = [tensor for tensor in graph.initializer if own.get(tensor.name) == name]
        nodes += _branch(name, body, held, ends[name], shapes)
    kept = [tensor for tensor in graph.initializer if tensor.name not in own]
    kept += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]
    ordered = _ordered(nodes, {tensor.name for tensor in kept} | {value.name for value in graph.input})
    if ordered is None:
        return content
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(ordered)
    graph.initializer.extend(kept)
    changed: bytes = model.SerializeToString()
    return changed


def _shapes(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    """Axes of each tensor: numbers, and a name for the batch."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }


def _measure_noise_instead(graph: onnx.GraphProto, shapes: Mapping[str, list[str | int]]) -> None:
    """Take sizes from the noise where it has the same: the slopes begin at ones of the objective's shape, and would wait for
    every modality's evidence."""
    for node in graph.node:
        axes = shapes.get(node.input[0]) if node.op_type == "Shape" else None
        if axes and axes == shapes[NOISE][: len(axes)] and all(a.name == "start" and a.i == 0 for a in node.attribute):
            node.input[0] = NOISE
            del node.attribute[:]
            node.attribute.extend([helper.make_attribute("start", 0), helper.make_attribute("end", len(axes))])


def _parts(graph: onnx.GraphProto, modalities: Sequence[str]) -> dict[int, str]:
    """The modality that a node, by its index, serves alone: what is computed from it, and what only that reads."""
    origins = {tensor: found & frozenset(modalities) for tensor, found in origins_of(graph).items()}
    parts: dict[int, str] = {}
    for index, node in enumerate(graph.node):
        if len(found := origins[node.output[0]]) == 1:
            (parts[index],) = found
    readers = _readers(graph)
    for index, node in reversed(list(enumerate(graph.node))):
        served = {parts.get(reader) for tensor in node.output for reader in readers.get(tensor, ())}
        if not origins[node.output[0]] and len(served) == 1 and (name := served.pop()) is not None:
            parts[index] = name
    return parts


def _readers(graph: onnx.GraphProto) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            found.setdefault(name, []).append(index)
    return found


def _rank(end: str, shapes: Mapping[str, list[str | int]]) -> int | None:
    """How many of the noise's axes a contribution has; more may follow, of size 1. None: it has others."""
    axes = shapes.get(end, [])
    same = next((i for i, (a, b) in enumerate(zip(axes, shapes[NOISE], strict=False)) if a != b), min(len(axes), 3))
    return same if same and all(axis == 1 for axis in axes[same:]) else None


def _branch(
    name: str,
    body: Iterable[onnx.NodeProto],
    held: Iterable[onnx.TensorProto],
    ends: Sequence[str],
    shapes: Mapping[str, list[str | int]],
) -> list[onnx.NodeProto]:
    """``ends`` of the body where some row has the modality, zeros elsewhere."""
    made = {end: f"{end}/made" for end in ends}
    taken = []
    for node in body:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [made.get(tensor, tensor) for tensor in node.input]
        copy.output[:] = [made.get(tensor, tensor) for tensor in node.output]
        taken.append(copy)
    zeros: list[onnx.NodeProto] = []
    for end in ends:
        rank = _rank(end, shapes) or 0
        ones = [f"{PRESENT}/one"] * (len(shapes[end]) - rank)
        zeros += [
            helper.make_node("Shape", [NOISE], [f"{end}/axes"], start=0, end=rank),
            helper.make_node("Concat", [f"{end}/axes", *ones], [f"{end}/shape"], axis=0),
            helper.make_node("ConstantOfShape", [f"{end}/shape"], [f"{end}/zeros"]),
        ]
    branches = {
        "then_branch": helper.make_graph(taken, f"{name}/then", [], _untyped(made.values()), list(held)),
        "else_branch": helper.make_graph(zeros, f"{name}/else", [], _untyped(f"{end}/zeros" for end in ends)),
    }
    return [
        helper.make_node("Gather", [f"{PRESENT}/some", f"{name}/column"], [f"{name}/some"], axis=0),
        helper.make_node("Cast", [f"{name}/some"], [f"{name}/there"], to=onnx.TensorProto.BOOL),
        helper.make_node("If", [f"{name}/there"], list(ends), **branches),
    ]


def _untyped(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]


def _bring_in(tensor: onnx.TensorProto, weights: bytes) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in tensor.external_data}
        begin = int(place["offset"])
        tensor.raw_data = weights[begin : begin + int(place["length"])]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _ordered(nodes: Sequence[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto] | None:
    """Each node behind what it reads; None where two wait for each other."""
    ordered: list[onnx.NodeProto] = []
    waiting = [(node, _reads(node)) for node in nodes]
    while waiting:
        ready = [node for node, reads in waiting if reads <= known]
        if not ready:
            return None
        waiting = [(node, reads) for node, reads in waiting if not reads <= known]
        known = known.union(*(node.output for node in ready))
        ordered += ready
    return ordered


def _reads(node: onnx.NodeProto) -> set[str]:
    """Its inputs, and what its branches take from around it."""
    reads = {name for name in node.input if name}
    for attribute in node.attribute:
        inner = {name for one in attribute.g.node for name in _reads(one)}
        inner -= {name for one in attribute.g.node for name in one.output}
        reads |= inner - {tensor.name for tensor in attribute.g.initializer}
    return reads
