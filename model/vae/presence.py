"""Networks run on the rows that have what they read: where most rows lack a modality, its networks cost little."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def recording(seen: Bool[Tensor, "batch ..."]) -> bool:
    """Whether a graph is being recorded: the batch has no number then, and no size may depend on values."""
    return isinstance(seen.shape[0], torch.SymInt)


def of_present(
    function: Callable[..., Tensor], seen: Bool[Tensor, " batch"], x: Shaped[Tensor, "batch ..."], *others: Tensor
) -> Shaped[Tensor, "batch ..."]:
    """``function(x, *others)`` of the rows that ``seen`` marks, zeros elsewhere. What fills x elsewhere has no influence, on
    gradients neither.

    Args:
        function: treats each row by itself.
        others: more tensors with a row for each of x.
    """
    if recording(seen):
        # Fillers are replaced before the function too: zero times the slope at a NaN is NaN in the gradient.
        made = function(torch.where(_beside(seen, x), x, torch.zeros_like(x)), *others)
        return torch.where(_beside(seen, made), made, torch.zeros_like(made))
    if bool(seen.all()):
        return function(x, *others)
    rows = seen.nonzero().flatten()
    made = function(x[rows], *(other[rows] for other in others))
    return made.new_zeros(len(seen), *made.shape[1:]).index_copy(0, rows, made)


def _beside(seen: Tensor, values: Tensor) -> Tensor:
    return seen.view(-1, *[1] * (values.ndim - 1))
