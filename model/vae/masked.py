"""Running networks only on the rows that have their modality, so that absent modalities cost little time in training."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def is_tracing(tensor: Shaped[Tensor, "batch ..."]) -> bool:
    """Whether the call is being traced for export. The batch size is symbolic then, and shapes must not depend on values."""
    return isinstance(tensor.shape[0], torch.SymInt)


def run_present(
    function: Callable[..., Tensor], present: Bool[Tensor, " batch"], x: Shaped[Tensor, "batch ..."], *others: Tensor
) -> Shaped[Tensor, "batch ..."]:
    """``function(x, *others)`` for the rows in ``present``, zeros for all other rows.

    The values of x in other rows (filler, possibly NaN) affect neither the result nor any gradient.

    Args:
        function: must treat each row independently.
        present: mask of the rows to run.
        x: (batch, ...).
        others: more tensors whose first axis is the batch.

    Returns:
        (batch, ...), the shape of the function's result.
    """
    # On a GPU the number of rows is not known to the CPU: to ask for it would stop the queue of kernels at every network.
    if is_tracing(present) or present.device.type != "cpu":
        # Filler is replaced before the function too: 0 * NaN in the backward pass would make the gradient NaN.
        result = function(torch.where(_expand_to(present, x), x, torch.zeros_like(x)), *others)
        return torch.where(_expand_to(present, result), result, torch.zeros_like(result))
    if bool(present.all()):
        return function(x, *others)
    rows = present.nonzero().flatten()
    result = function(x[rows], *(other[rows] for other in others))
    return result.new_zeros(len(present), *result.shape[1:]).index_copy(0, rows, result)


def _expand_to(mask: Tensor, values: Tensor) -> Tensor:
    """The mask (batch,) with trailing axes of size 1, so that it broadcasts against ``values``."""
    return mask.view(-1, *[1] * (values.ndim - 1))
