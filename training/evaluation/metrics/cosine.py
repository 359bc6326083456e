"""Cosine similarity between embeddings of one modality and of all modalities (Oshima et al. 2024), with a shuffled control."""

import torch
from jaxtyping import Float
from torch import Tensor


def cosine(
    single: Float[Tensor, "row latent"], multimodal: Float[Tensor, "row latent"], generator: torch.Generator
) -> tuple[float, float]:
    """Return the mean cosine similarity of a row's two embeddings, and of embeddings of two different rows.

    The second number is the control: the similarity that all rows share.

    Args:
        single: posterior means of one modality.
        multimodal: posterior means of all modalities, refined if the model refines.
        generator: random numbers of the control. It pairs each row with the next one in a random order, so no row meets itself.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(single) < 2:
        raise ValueError(f"the shuffled control needs at least 2 rows, received {len(single)}")
    order = torch.randperm(len(single), generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    pairs = (multimodal, multimodal[other])
    matched, control = (torch.cosine_similarity(single, rows, dim=1).mean().item() for rows in pairs)
    return matched, control
