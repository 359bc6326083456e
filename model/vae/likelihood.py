"""log p(x_m | z) and the expected value of each likelihood, as functions of the decoder's output.

A decoder's output ("raw") is unconstrained: logits for images, spectrograms, tokens, attributes and classes, the location for
vectors. During export the functions use elementary operations only, because the gradients of PyTorch's fused losses cannot be
exported to ONNX.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from concord.model.modality import CategoricalModality, Modality, TextModality, VectorModality
from concord.model.vae.masked import is_tracing


def expectation(modality: Modality, raw: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Expected value of x given the decoder's output.

    Args:
        raw: (batch, *shape), for text and classes (batch, *shape, category).

    Returns:
        image and audio (batch, channels, height, width) in [0, 1]; vector (batch, size); probabilities of attributes (batch,
        size) or classes (batch, class); log-probabilities of text tokens (batch, length, token).
    """
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
        x: the observed rows (batch, *shape): int64 ids for text and classes, else float.
    """
    if isinstance(modality, TextModality | CategoricalModality):
        if modality.likelihood == "categorical" and not is_tracing(raw):
            return _categorical(raw, x)
        categories = torch.arange(raw.shape[-1], device=raw.device)
        one_hot = (x.unsqueeze(-1) == categories).to(raw.dtype)
        terms = torch.log_softmax(raw, dim=-1)
        return _shifted(terms, one_hot) if modality.likelihood == "shifted" else (terms * one_hot).flatten(1).sum(1)
    if modality.likelihood == "bernoulli":
        # log sigmoid(raw) for x = 1, log sigmoid(-raw) for x = 0, without overflow.
        terms = raw * x - raw.clamp(min=0) - torch.log1p(torch.exp(-raw.abs()))
        return terms.flatten(1).sum(1)
    distance = (x - expectation(modality, raw)) / modality.scale
    if modality.likelihood == "laplace":
        terms = -distance.abs() - math.log(2 * modality.scale)
    else:
        terms = -0.5 * distance.square() - math.log(modality.scale) - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def _categorical(raw: Float[Tensor, "batch length token"], tokens: Shaped[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
    """Return the log-probability of the observed tokens.

    It picks one logit of each position. A product with one-hot vectors would write arrays of (batch, length, token) several
    times, which takes longer than the networks if the vocabulary is large.
    """
    observed = tokens.clamp(0, raw.shape[-1] - 1)  # filler of absent rows may be out of range
    return -cross_entropy(raw.flatten(0, 1), observed.flatten(), reduction="none").view(tokens.shape).sum(1)


def _shifted(
    terms: Float[Tensor, "batch length token"], one_hot: Float[Tensor, "batch length token"]
) -> Float[Tensor, " batch"]:
    """log of the mean probability over all cyclic shifts, where decoded position i predicts the observed token i + shift.

    Args:
        terms: log-probabilities at each decoded position.
        one_hot: the observed tokens.
    """
    length = terms.shape[1]
    positions = torch.arange(length, device=terms.device)
    # (decoded position, observed position, shift): 1 if they match. The matrix product sums the diagonal of each shift.
    matches = ((positions[:, None, None] + positions) % length == positions[:, None]).to(terms.dtype)
    by_shift = (terms @ one_hot.transpose(1, 2)).flatten(1) @ matches.flatten(0, 1)
    # logsumexp(x) = x_0 - log_softmax(x)_0, in operations that can be exported with their gradient.
    return by_shift[:, 0] - torch.log_softmax(by_shift, dim=1)[:, 0] - math.log(length)
