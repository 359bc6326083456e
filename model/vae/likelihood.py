"""log p(x_m | z) and the expected value of each likelihood, as functions of the decoder's output.

A decoder's output ("raw") is unconstrained: logits for images, spectrograms, tokens, attributes and classes, the location for
vectors, all parameters of the components for an image with the ``logistic_mixture``. During export the functions use elementary
operations only, because the gradients of PyTorch's fused losses cannot be exported to ONNX.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy

from concord.model.modality import (
    PIXEL_LEVELS,
    AudioModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)
from concord.model.vae.masked import is_tracing

HALF_LEVEL = 0.5 / (PIXEL_LEVELS - 1)
"""Half the distance between two levels of a pixel."""
MIN_LOG_SCALE = -7.0
"""Of a logistic component: a quarter of the distance between two levels. The largest scale is 1, the range of a pixel."""


def raw_channels(modality: ImageModality | AudioModality) -> int:
    """Channels of the decoder's output of an image or a spectrogram.

    Of a ``logistic_mixture``: for each component its logit, then the locations, then the scales, one for each channel.
    """
    if modality.likelihood == "logistic_mixture":
        return modality.components * (1 + 2 * modality.channels)
    return modality.shape[0]


def expectation(modality: Modality, raw: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Expected value of x given the decoder's output.

    Args:
        raw: (batch, *shape), for text and classes (batch, *shape, category), for images and spectrograms (batch,
            ``raw_channels``, height, width).

    Returns:
        image and audio (batch, channels, height, width) in [0, 1]; vector (batch, size); probabilities of attributes (batch,
        size) or classes (batch, class); log-probabilities of text tokens (batch, length, token).
    """
    if isinstance(modality, TextModality):
        return torch.log_softmax(raw, dim=-1)
    if isinstance(modality, CategoricalModality):
        return torch.softmax(raw, dim=-1).squeeze(1)
    if modality.likelihood == "logistic_mixture":
        return _mixture_mean(_components(modality, raw))
    return raw if isinstance(modality, VectorModality) else torch.sigmoid(raw)


def log_likelihood(
    modality: Modality,
    raw: Float[Tensor, "batch ..."],
    x: Shaped[Tensor, "batch ..."],
    log_scale: Float[Tensor, "channel 1 1"] | None = None,
) -> Float[Tensor, " batch"]:
    """log p(x | z) of each row in nats, unweighted, summed over the modality's values.

    Args:
        raw: the decoder's output, see ``expectation``.
        x: the observed rows (batch, *shape): int64 ids for text and classes, else float.
        log_scale: logarithm of the scale of the Laplace or the Gaussian. None: that of ``modality.scale``.
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
    if modality.likelihood == "logistic_mixture":
        return _logistic_mixture(_components(modality, raw), x)
    difference = x - expectation(modality, raw)
    distance = difference / modality.scale if log_scale is None else difference * (-log_scale).exp()
    log_of_scale = math.log(modality.scale) if log_scale is None else log_scale
    if modality.likelihood == "laplace":
        terms = -distance.abs() - (math.log(2) + log_of_scale)
    else:
        terms = -0.5 * distance.square() - log_of_scale - 0.5 * math.log(2 * math.pi)
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


class _Components(NamedTuple):
    """Parameters of a mixture of logistic distributions at each pixel. The channels of a pixel share the component."""

    log_weights: Float[Tensor, "batch component height width"]
    location: Float[Tensor, "batch component channel height width"]
    log_scale: Float[Tensor, "batch component channel height width"]


def _components(modality: ImageModality, raw: Float[Tensor, "batch raw height width"]) -> _Components:
    count, channels = modality.components, modality.channels
    shape = (-1, count, channels, modality.height, modality.width)
    location, scale = raw[:, count:].chunk(2, dim=1)
    return _Components(
        torch.log_softmax(raw[:, :count], dim=1),
        torch.sigmoid(location).reshape(shape),
        MIN_LOG_SCALE * torch.sigmoid(scale - 1).reshape(shape),  # at the start a scale of about 0.15
    )


def _logistic_mixture(mixture: _Components, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, " batch"]:
    """Log-probability of the level of each pixel: the mass of the mixture between the edges of the level.

    The lowest and the highest level have all mass below 0 and above 1. Given the component, the channels are independent.
    Source: Salimans et al. 2017, section 2.1.
    """
    x = x.unsqueeze(1)
    precision = (-mixture.log_scale).exp()
    upper, lower = (precision * (x - mixture.location + edge) for edge in (HALF_LEVEL, -HALF_LEVEL))
    width = 2 * HALF_LEVEL * precision
    is_lowest, is_highest = x < HALF_LEVEL, x > 1 - HALF_LEVEL
    # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), where 1 - exp(-w) = tanh(w / 2) (1 + exp(-w)): a plain
    # difference is 0 far from the location.
    between = torch.log(torch.tanh(width / 2)) + torch.log1p(torch.exp(-width))
    terms = (
        torch.where(is_highest, 0.0, _log_sigmoid(upper))
        + torch.where(is_lowest, 0.0, _log_sigmoid(-lower))
        + torch.where(is_lowest | is_highest, 0.0, between)
    )
    by_component = mixture.log_weights + terms.sum(2)
    # logsumexp, as in ``_shifted``.
    return (by_component[:, 0] - torch.log_softmax(by_component, dim=1)[:, 0]).flatten(1).sum(1)


def _mixture_mean(mixture: _Components) -> Float[Tensor, "batch channel height width"]:
    """Mean of the mixture with all mass below 0 at 0 and all above 1 at 1, the integral of P(x > t) over t from 0 to 1.

    It differs from the mean of the levels by the squared distance between two levels.
    """
    scale = mixture.log_scale.exp()
    # The integral of sigmoid((location - t) / scale) is a difference of softplus(y) = -log sigmoid(-y).
    at_0, at_1 = (_log_sigmoid((edge - mixture.location) / scale) for edge in (0, 1))
    means = scale * (at_1 - at_0)
    return (mixture.log_weights.exp().unsqueeze(2) * means).sum(1).clamp(0, 1)  # rounding may leave -1e-7


def _log_sigmoid(x: Tensor) -> Tensor:
    """Logarithm of the sigmoid without overflow, in operations that can be exported with their gradient."""
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))
