"""Cosine similarity between embeddings of one modality and of all (Oshima et al. 2024), with a shuffled control."""

import torch
from jaxtyping import Float
from torch import Tensor


def cosine(
    single: Float[Tensor, "row latent"], multimodal: Float[Tensor, "row latent"], generator: torch.Generator
) -> tuple[float, float]:
    """Mean cosine of each row's two embeddings, and the same with the second of another row: what rows share anyway.

    Args:
        single: posterior means of one modality.
        multimodal: posterior means of all modalities, refined where the model refines.
        generator: of the shuffle, a shift of shuffled rows, so that no row meets itself.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(single) < 2:
        raise ValueError(f"a control needs two rows or more, received {len(single)}")
    order = torch.randperm(len(single), generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    pairs = (multimodal, multimodal[other])
    matched, control = (torch.cosine_similarity(single, rows, dim=1).mean().item() for rows in pairs)
    return matched, control
