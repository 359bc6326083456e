"""Log-probabilities of observed tokens from the input of the output layer, without the logits of the whole batch in float32.

With a vocabulary of thousands of words, much time of a training step would go into reading and writing the logits, their
log-softmax and the gradient of both, each of size (row, token) in float32. Here the output layer and its loss are computed for
a few rows at a time, which stay in the processor's cache. The backward pass needs the logits only, in the type of the products.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 2 << 20
"""Size of the logits of one chunk in float32: about the L2 cache of a core."""


def token_log_likelihood(
    hidden: Float[Tensor, "row feature"],
    weight: Float[Tensor, "token feature"],
    bias: Float[Tensor, " token"],
    tokens: Int[Tensor, " row"],
) -> Float[Tensor, " row"]:
    """Return log softmax(hidden @ weight.T + bias)[tokens] in nats, float32.

    Args:
        hidden: input of the output layer.
        weight, bias: of the output layer.
        tokens: observed ids, from 0 to the number of tokens - 1.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    value, _ = _TokenLogLikelihood.apply(hidden.to(dtype), weight.to(dtype), bias.to(dtype), tokens)  # type: ignore[no-untyped-call]
    assert isinstance(value, Tensor)
    return value


def _chunks(logits: Tensor) -> list[slice]:
    """Return the rows of each chunk."""
    rows, categories = logits.shape
    # Not on a GPU, which small kernels leave idle.
    size = CHUNK_BYTES // (4 * categories) if logits.device.type == "cpu" else rows
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, rows, size)]


class _TokenLogLikelihood(torch.autograd.Function):
    """``token_log_likelihood``, and the logits."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden.new_empty(len(hidden), len(weight))
        value = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(logits):
            chunk = torch.addmm(bias, hidden[rows], weight.t())
            logits[rows] = chunk
            value[rows] = torch.log_softmax(chunk.float(), 1).gather(1, tokens[rows, None])[:, 0]
        return value, logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, _, tokens = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else PyTorch writes a gradient of zeros for the logits
        ctx.save_for_backward(hidden, weight, tokens, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, logits = ctx.saved_tensors
        upstream, trains_weights = upstream.unsqueeze(1), ctx.needs_input_grad[1]
        of_hidden = torch.empty_like(hidden)
        of_weight, of_bias = torch.zeros_like(weight, dtype=torch.float32), logits.new_zeros(len(weight), dtype=torch.float32)
        for rows in _chunks(logits):
            # d log p(token) / d logits = one_hot(token) - softmax(logits)
            of_logits = torch.softmax(logits[rows].float(), 1).mul_(-upstream[rows])
            of_logits.scatter_add_(1, tokens[rows, None], upstream[rows].to(of_logits.dtype))
            if trains_weights:
                of_bias += of_logits.sum(0)
            of_logits = of_logits.to(hidden.dtype)
            of_hidden[rows] = of_logits @ weight
            if trains_weights:
                of_weight += of_logits.t() @ hidden[rows]
        weight_gradients = (of_weight.to(weight.dtype), of_bias.to(weight.dtype)) if trains_weights else (None, None)
        return of_hidden, *weight_gradients, None
