"""The recorded step against the one that PyTorch runs, and the rules of differentiation against autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.export import ExportedProgram

from model.vae.gaussian import Gaussian
from model.vae.multimodal import MultimodalVAE
from model.vae.tracing import _convolution_backward, _slice_backward, trace

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
def recorded(tiny_vae: MultimodalVAE, make_rows) -> ExportedProgram:
    return trace(step_of(tiny_vae), arguments(tiny_vae, make_rows, 7))


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_the_record_agrees_at_every_batch_size(
    tiny_vae: MultimodalVAE, make_rows, recorded: ExportedProgram, rows: int
) -> None:
    tensors = arguments(tiny_vae, make_rows, rows, seed=rows)
    for found, expected in zip(recorded.module()(*tensors), step_of(tiny_vae)(*tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_record_holds_no_backward_operator(recorded: ExportedProgram) -> None:
    """What PyTorch calls ``*_backward`` has no counterpart in ONNX."""
    operators = {str(node.target) for node in recorded.graph.nodes if node.op == "call_function"}
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
def test_the_rule_for_convolutions(
    transposed: bool, side: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, *side, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6 // groups if transposed else 4 // groups, kernel, kernel, dtype=torch.float64)
    run = F.conv_transpose2d if transposed else F.conv2d
    y = run(x, weight, None, stride=stride, padding=padding, dilation=dilation, groups=groups)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    found, *others = _convolution_backward(
        gradient, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups, [True, False, False]
    )
    torch.testing.assert_close(found, expected)
    assert others == [None, None]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(("start", "end"), [(0, 5), (2, 4), (1, 2**63 - 1), (0, 2), (3, 3)])
def test_the_rule_for_slices(dim: int, start: int, end: int) -> None:
    x = torch.randn(5, 5, 5, dtype=torch.float64, requires_grad=True)
    y = torch.ops.aten.slice(x, dim, start, end)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(_slice_backward(gradient, [5, 5, 5], dim, start, end, 1), expected)


def test_slices_with_gaps_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="contiguous"):
        _slice_backward(torch.zeros(2), [4], 0, 0, 4, 2)
