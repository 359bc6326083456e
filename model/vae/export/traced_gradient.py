"""Tracing of functions that compute gradients, such as the refinement step, into graphs of standard operators.

``torch.export`` cannot trace a function that differentiates. ``make_fx`` can: it records the tensor operations of the forward
and the backward pass, and ``torch.export`` can export this record. The module uses two private parts of PyTorch, so the version
of PyTorch is pinned and the parity of every exported bundle is checked.
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
"""Largest batch size of exported graphs, in rows."""
Size = int | torch.SymInt
"""Size of an axis during tracing. The batch size is symbolic."""


def trace(function: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]) -> ExportedProgram:
    """Graph of ``function`` with a dynamic batch size. The function may compute gradients.

    Args:
        function: its arguments are tensors whose first axis is the batch. Parameters of its closure become constants.
        example: one tensor per argument. Their batch size must be larger than 1 and differ from the size of every other axis.
    """
    functional = torch.func.functionalize(function, remove="mutations")
    recorded = make_fx(functional, tracing_mode="symbolic", decomposition_table=_decompositions(), _allow_non_fake_inputs=True)(
        *example
    )
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export copies deprecated classes of PyTorch
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
