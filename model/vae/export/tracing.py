"""Tracing of functions into graphs of operators that ONNX has, also of functions that compute gradients.

``torch.export`` cannot trace a function that differentiates, such as the refinement step. ``make_fx`` can: it records the
tensor operations of the forward and the backward pass. One pass of it with a symbolic batch size yields what ``torch.export``
and the ONNX exporter need four passes for. The module uses private parts of PyTorch, so the version of PyTorch is pinned and
the parity of every exported bundle is checked.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.exported_program import _override_composite_implicit_decomp, _split_decomp_table_to_cia_and_python_decomp
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from concord.model.vae.export import onnx_functions

aten = torch.ops.aten
Size = int | torch.SymInt
"""Size of an axis during tracing. The batch size is symbolic."""


def trace(function: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]) -> ExportedProgram:
    """Graph of ``function`` with a dynamic batch size. The function may compute gradients.

    Args:
        function: its arguments are tensors whose first axis is the batch. Parameters of its closure become constants.
        example: one tensor per argument. Their batch size must be larger than 1 and differ from the size of every other axis.
    """
    inputs = _symbolic(example)
    functional = torch.func.functionalize(function, remove="mutations")
    recorded = make_fx(functional, tracing_mode="symbolic", decomposition_table=_decompositions())(*inputs)
    return _program(recorded, inputs)


def trace_forward(function: Callable[..., Tensor | tuple[Tensor, ...]], example: Sequence[Tensor]) -> ExportedProgram:
    """``trace`` for a function without gradients. Compound operators that ONNX has, such as ``linear``, remain whole."""
    inputs = _symbolic(example)
    tables: Any = _split_decomp_table_to_cia_and_python_decomp(dict(onnx_functions.decompositions()))
    compound, others = tables
    with _override_composite_implicit_decomp(compound):
        recorded = make_fx(function, tracing_mode="symbolic", decomposition_table=others)(*inputs)
    return _program(recorded, inputs)


def _symbolic(example: Sequence[Tensor]) -> list[Tensor]:
    """Tensors without values. Their batch size is the same symbol, all other sizes are fixed."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    return [
        mode.from_tensor(
            tensor,
            source=ConstantSource(f"input_{number}"),
            symbolic_context=StatelessSymbolicContext([DimDynamic.DUCK, *[DimDynamic.STATIC] * (tensor.ndim - 1)]),
        )
        for number, tensor in enumerate(example)
    ]


def _program(recorded: GraphModule, inputs: Sequence[Tensor]) -> ExportedProgram:
    """The recorded graph in the form that the ONNX exporter reads, with constants as inputs."""
    graph = recorded.graph
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=aten.sym_numel.default):
        _replace_numel(graph, node)
    arguments = graph.find_nodes(op="placeholder")
    constants: dict[str, Any] = {}
    placeholders: dict[str, Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in placeholders:
            constants[name] = getattr(recorded, name).detach()
            with graph.inserting_before(arguments[0]):
                placeholders[name] = graph.placeholder(f"constant_{name}")
            placeholders[name].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(placeholders[name])
        graph.erase_node(node)
    outputs = tuple(pytree.tree_leaves(graph.output_node().args))
    graph.output_node().args = (outputs,)
    signature = ExportGraphSignature(
        [
            *(InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name) for name, node in placeholders.items()),
            *(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in arguments),
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    of_inputs, of_outputs = pytree.tree_structure((tuple(inputs), {})), pytree.tree_structure(outputs)
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict={},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", ModuleCallSignature([], [], of_inputs, of_outputs))],
        constants=constants,
    )


def _replace_numel(graph: Graph, node: Node) -> None:
    """Compute a number of elements as the product of the sizes: the ONNX exporter has no function for it."""
    (tensor,) = node.args
    assert isinstance(tensor, Node)
    shape = tensor.meta["val"].shape
    product: Any = 1
    with graph.inserting_before(node):
        for axis, size in enumerate(shape):
            factor: Any = size
            if isinstance(size, torch.SymInt):
                factor = graph.call_function(aten.sym_size.int, (tensor, axis))
                factor.meta["val"] = size
            product = graph.call_function(operator.mul, (product, factor))
            product.meta["val"] = shape[: axis + 1].numel()
    node.replace_all_uses_with(product)
    graph.erase_node(node)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {
        **onnx_functions.decompositions(),
        **core_aten_decompositions(),
        aten.convolution_backward.default: _convolution_backward,
        aten.slice_backward.default: _slice_backward,
        aten.empty_permuted.default: _empty_permuted,
    }


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _output_padding: list[int],
    groups: int,
    _mask: list[bool],
) -> tuple[Tensor, None, None]:
    """Gradient of a convolution with respect to its input: a transposed convolution with the same weight, and vice versa. The
    gradients of weight and bias are not needed."""
    if transposed:
        output_padding = [0] * len(stride)
    else:
        output_padding = [
            x.shape[2 + i]
            - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i in range(len(stride))
        ]
    input_gradient = aten.convolution(gradient, weight, None, stride, padding, dilation, not transposed, output_padding, groups)
    return input_gradient, None, None


def _slice_backward(gradient: Tensor, sizes: list[Size], dim: int, start: Size, end: Size, step: int) -> Tensor:
    """Gradient of a slice: the gradient padded with zeros. PyTorch's rule uses a scatter, which is much slower."""
    if step != 1:
        raise NotImplementedError(f"the step of a slice must be 1, received {step}: decoders use contiguous slices only")
    after = sizes[dim] - min(end, sizes[dim])
    padding = [0, 0] * (len(sizes) - 1 - dim) + [start, after]
    return torch.constant_pad_nd(gradient, padding)


def _empty_permuted(size: list[Size], _layout: list[int], **options: Any) -> Tensor:
    """Zeros instead of uninitialised memory, which ONNX does not have. Every use overwrites the values."""
    return torch.zeros(size, dtype=options.get("dtype"))
