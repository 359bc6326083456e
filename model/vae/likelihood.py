"""log p(x_m | z) of each likelihood, as functions of what a decoder puts out.

A decoder puts out unconstrained numbers ("raw"): logits for images, tokens, attributes and classes, the location itself for
vectors.
Everything here is elementary functions alone, because the fused losses of PyTorch do not convert to ONNX when differentiated.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from model.modality import CategoricalModality, Modality, TextModality, VectorModality


def expectation(modality: Modality, raw: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """What the decoder expects: image in [0, 1], vector, probabilities of attributes (batch, size) or of classes
    (batch, class); for text each token's log-probability."""
    if isinstance(modality, TextModality):
        return torch.log_softmax(raw, dim=-1)
    if isinstance(modality, CategoricalModality):
        return torch.softmax(raw, dim=-1).squeeze(1)
    return raw if isinstance(modality, VectorModality) else torch.sigmoid(raw)


def log_likelihood(
    modality: Modality, raw: Float[Tensor, "batch ..."], x: Shaped[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """log p(x | z) of each row in nats, unweighted, summed over the modality's values.

    Args:
        raw: the decoder's output: (batch, *shape), for text and classes (batch, *shape, category).
        x: the observed rows; ids for text and classes, float otherwise.
    """
    if isinstance(modality, TextModality | CategoricalModality):
        tokens = torch.arange(raw.shape[-1], device=raw.device)
        chosen = (x.unsqueeze(-1) == tokens).to(raw.dtype)
        terms = torch.log_softmax(raw, dim=-1)
        return _shifted(terms, chosen) if modality.likelihood == "shifted" else (terms * chosen).flatten(1).sum(1)
    if modality.likelihood == "bernoulli":
        # The logarithm of the sigmoid, safe at both ends.
        terms = raw * x - raw.clamp(min=0) - torch.log1p(torch.exp(-raw.abs()))
        return terms.flatten(1).sum(1)
    distance = (x - expectation(modality, raw)) / modality.scale
    if modality.likelihood == "laplace":
        terms = -distance.abs() - math.log(2 * modality.scale)
    else:
        terms = -0.5 * distance.square() - math.log(modality.scale) - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def _shifted(
    terms: Float[Tensor, "batch length token"], chosen: Float[Tensor, "batch length token"]
) -> Float[Tensor, " batch"]:
    """log of the mean, over all cyclic shifts, of the probability that decoded place i gives observed token i + shift.

    Args:
        terms: log-probabilities of each decoded place.
        chosen: the observed tokens, one-hot.
    """
    length = terms.shape[1]
    places = torch.arange(length, device=terms.device)
    # (decoded place, observed place, shift): 1 where they meet. One product with it sums each shift's diagonal.
    meet = ((places[:, None, None] + places) % length == places[:, None]).to(terms.dtype)
    by_shift = (terms @ chosen.transpose(1, 2)).flatten(1) @ meet.flatten(0, 1)
    # The logarithm of a sum of exponentials, as the difference from any one of the terms.
    return by_shift[:, 0] - torch.log_softmax(by_shift, dim=1)[:, 0] - math.log(length)
