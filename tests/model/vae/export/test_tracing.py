"""Tracing: the traced refinement step against the eager one, and the gradient rules against autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.export import ExportedProgram

from concord.model.vae.export.tracing import _convolution_backward, _slice_backward, trace
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.multimodal import MultimodalVAE

SAMPLES = 2


def arguments(vae: MultimodalVAE, make_rows: Callable[..., dict[str, Tensor]], rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, 4, generator=generator) < 0.6
    present[:, 0] |= ~present.any(1)
    posteriors = [0.5 * torch.randn(rows, vae.latent, generator=generator) for _ in range(4)]
    noise = torch.randn(rows, SAMPLES, vae.latent, generator=generator)
    return [*make_rows(vae.modalities, rows, seed).values(), present, *posteriors, noise]


def step_of(vae: MultimodalVAE) -> Callable[..., tuple[Tensor, ...]]:
    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = dict(zip((m.name for m in vae.modalities), tensors, strict=False))
        present, mean, log_var, anchor_mean, anchor_log_var, noise = tensors[4:]
        after, objective = vae.refine_step(
            arrays, present, Gaussian(mean, log_var), Gaussian(anchor_mean, anchor_log_var), noise
        )
        return after.mean, after.log_var, objective

    return step


@pytest.fixture(scope="module")
def traced_step(tiny_vae: MultimodalVAE, make_rows) -> ExportedProgram:
    return trace(step_of(tiny_vae), arguments(tiny_vae, make_rows, 7))


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_trace_equals_eager_step_at_every_batch_size(
    tiny_vae: MultimodalVAE, make_rows, traced_step: ExportedProgram, rows: int
) -> None:
    tensors = arguments(tiny_vae, make_rows, rows, seed=rows)
    for actual, expected in zip(traced_step.module()(*tensors), step_of(tiny_vae)(*tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_trace_has_no_backward_operators(traced_step: ExportedProgram) -> None:
    """ONNX has no counterpart of PyTorch's ``*_backward`` operators."""
    operators = {str(node.target) for node in traced_step.graph.nodes if node.op == "call_function"}
    assert any("convolution" in name for name in operators)
    assert not [name for name in operators if "backward" in name]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((8, 8), 4, 2, 1, 1, 1),
        ((7, 9), 4, 2, 1, 1, 1),
        ((8, 5), 3, 1, 1, 1, 1),
        ((9, 9), 3, 2, 0, 1, 1),
        ((9, 8), 3, 1, 2, 2, 2),
    ],
)
def test_convolution_backward_equals_autograd(
    transposed: bool, side: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, *side, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // groups if transposed else 4 // groups, kernel, kernel, dtype=torch.float64)
    convolution = F.conv_transpose2d if transposed else F.conv2d
    y = convolution(x, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    actual, *others = _convolution_backward(
        gradient, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups, [True, False, False]
    )
    torch.testing.assert_close(actual, expected)
    assert others == [None, None]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("start", "end"), [(0, 5), (2, 4), (1, 2**63 - 1), (0, 2), (3, 3)])
def test_slice_backward_equals_autograd(dim: int, start: int, end: int) -> None:
    x = torch.randn(5, 5, 5, dtype=torch.float64, requires_grad=True)
    y = torch.ops.aten.slice(x, dim, start, end)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(_slice_backward(gradient, [5, 5, 5], dim, start, end, 1), expected)


def test_slice_backward_with_step_raises() -> None:
    with pytest.raises(NotImplementedError, match="contiguous"):
        _slice_backward(torch.zeros(2), [4], 0, 0, 4, 2)
