"""The refinement step, gradient included, as a graph of standard operators.

``torch.export`` cannot follow a function that differentiates. ``make_fx`` can: it records the tensor operations of the
forward and the backward pass as they run, and that record exports like any other graph. It leans on two private parts of
PyTorch, so the version is pinned and the parity of every exported bundle is checked.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
MAX_BATCH = 1 << 16
Size = int | torch.SymInt
"""An axis while it is recorded: the batch has no number then."""


def trace(function: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]) -> ExportedProgram:
    """Record ``function``, which may differentiate inside, with a free batch size.

    Args:
        function: of tensors whose first axis is the batch; parameters it closes over become constants.
        example: one tensor for each argument, of a batch size above 1 that no other axis has.
    """
    functional = torch.func.functionalize(function, remove="mutations")
    recorded = make_fx(functional, tracing_mode="symbolic", decomposition_table=_decompositions(), _allow_non_fake_inputs=True)(
        *example
    )
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export copies its own deprecated classes
        return torch.export.export(recorded, tuple(example), dynamic_shapes=tuple({0: batch} for _ in example), strict=False)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {
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
    """Gradient for the input alone, a convolution with the same weight; that of the weight is never asked for."""
    if transposed:
        output_padding = [0] * len(stride)
    else:
        output_padding = [
            x.shape[2 + i]
            - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i in range(len(stride))
        ]
    back = aten.convolution(gradient, weight, None, stride, padding, dilation, not transposed, output_padding, groups)
    return back, None, None


def _slice_backward(gradient: Tensor, sizes: list[Size], dim: int, start: Size, end: Size, step: int) -> Tensor:
    """Zeros around the gradient. The general rule scatters, which runs far slower."""
    if step != 1:
        raise NotImplementedError("only contiguous slices are used in decoders")
    after = sizes[dim] - min(end, sizes[dim])
    padding = [0, 0] * (len(sizes) - 1 - dim) + [start, after]
    return torch.constant_pad_nd(gradient, padding)


def _empty_permuted(size: list[Size], _layout: list[int], **options: Any) -> Tensor:
    """Uninitialised memory has no counterpart in ONNX; every use here overwrites it."""
    return torch.zeros(size, dtype=options.get("dtype"))
