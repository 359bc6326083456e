"""Linear baselines: canonical correlation analysis to search, logistic and ridge regression to predict what is missing.

They read what a person would compute in an afternoon: colour and gradient histograms of an image, the words of a text, numbers
and attributes as they are.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, Shaped

from concord.model.modality import CategoricalModality, ImageModality, Modality, TextModality

PENALTIES = (0.01, 0.1, 1.0, 3.0, 10.0)
"""Relative to the variance of a standardised feature. One of them is chosen on training rows."""
CELL = 5
"""Height and width in pixels of the cells of an image whose gradients are counted."""
ORIENTATIONS, LEVELS = 9, 4
"""Bins of the direction of a gradient (Dalal & Triggs 2005), and of each colour."""
_VALIDATION = 0.2
_LOGISTIC_STEPS = 100


@dataclass(frozen=True)
class Affine:
    """The map x -> (x - mean) @ weights + offset."""

    mean: Float[np.ndarray, " feature"]
    weights: Float[np.ndarray, "feature output"]
    offset: Float[np.ndarray, " output"]

    def __call__(self, x: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, "row output"]:
        """Return the outputs of each row."""
        return np.asarray((x - self.mean) @ self.weights + self.offset)


def features(modality: Modality, values: Shaped[np.ndarray, "row ..."]) -> Float[np.ndarray, "row feature"]:
    """Return the features of the values of a modality, one row for each."""
    if isinstance(modality, ImageModality):
        return np.concatenate([_gradients(values), _colours(values)], axis=1)
    if isinstance(modality, TextModality | CategoricalModality):
        counts = np.zeros((len(values), modality.categories), np.float32)
        np.add.at(counts, (np.arange(len(values))[:, None], values), 1)
        if isinstance(modality, TextModality):
            counts[:, 0] = 0  # padding
        return np.minimum(counts, 1)
    return values.reshape(len(values), -1).astype(np.float32)


def ridge(x: Float[np.ndarray, "row feature"], y: Float[np.ndarray, "row output"], penalty: float) -> Affine:
    """Return the minimum of |y - f(x)|^2 / rows + penalty |weights of standardised x|^2, in closed form."""
    side, offset = _Side.of(x), y.mean(0, dtype=np.float64)
    return _solve(side, side.gram, side.product(y - offset), offset, penalty)


def tuned_ridge(x: Float[np.ndarray, "row feature"], y: Float[np.ndarray, "row output"]) -> Affine:
    """Return ``ridge`` with the penalty of ``PENALTIES`` that predicts a fifth of the rows best from the others."""
    side, offset, held_out = _Side.of(x), y.mean(0, dtype=np.float64), _held_out(len(x))
    gram, product = side.gram, side.product(y - offset)
    if held_out.all():
        return _solve(side, gram, product, offset, PENALTIES[-1])
    rest = replace(side, standard=side.standard[~held_out])
    gram_of_rest, product_of_rest = rest.gram, rest.product((y - offset)[~held_out])

    def error(penalty: float) -> float:
        predicted = _solve(rest, gram_of_rest, product_of_rest, offset, penalty)(x[held_out])
        return float(np.square(predicted - y[held_out]).mean())

    return _solve(side, gram, product, offset, min(PENALTIES, key=error))


def logistic(
    x: Float[np.ndarray, "row feature"], classes: Integer[np.ndarray, " row"], categories: int, penalty: float = 1e-3
) -> Callable[[Float[np.ndarray, "other feature"]], Float[np.ndarray, "other category"]]:
    """Return the probabilities of multinomial logistic regression as a function of the features.

    It minimises the mean negative log-likelihood + penalty / 2 |weights of standardised x|^2. Classes without rows have the
    probability 0.

    Args:
        categories: number of classes.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - 110 MiB, which most commands do without

    side, known = _Side.of(x), np.unique(classes)
    if len(known) == 1:
        return lambda other: np.broadcast_to(np.eye(categories)[known[0]], (len(other), categories))
    model = LogisticRegression(C=1 / (penalty * len(x)), max_iter=_LOGISTIC_STEPS, tol=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # the last digits of the weights do not matter
        model.fit(side.standard, classes)

    def probabilities(other: Float[np.ndarray, "other feature"]) -> Float[np.ndarray, "other category"]:
        found = np.zeros((len(other), categories))
        found[:, known] = model.predict_proba(((other - side.mean) / side.std).astype(np.float32))
        return found

    return probabilities


def cca(
    x: Float[np.ndarray, "row feature"], y: Float[np.ndarray, "row other"], dimensions: int, penalty: float
) -> tuple[Affine, Affine, Float[np.ndarray, " dimension"]]:
    """Return regularised canonical correlation analysis (Hotelling 1936): two maps into a common space, and the correlations.

    Both maps weigh each dimension by its correlation, so that cosine similarity trusts the first ones most.

    Args:
        dimensions: largest number of dimensions of the space.
        penalty: added to the variance of each standardised feature.
    """
    return _correlate(_Side.of(x), _Side.of(y), dimensions, penalty)


def tuned_cca(x: Float[np.ndarray, "row feature"], y: Float[np.ndarray, "row other"], dimensions: int) -> tuple[Affine, Affine]:
    """Return the maps of ``cca`` with the penalty of ``PENALTIES`` that finds a fifth of the rows best by the others."""
    held_out, chosen = _held_out(len(x)), PENALTIES[-1]
    if not held_out.all():
        sides = _Side.of(x[~held_out]), _Side.of(y[~held_out])

        def mean_log_rank(penalty: float) -> float:
            of_x, of_y, _ = _correlate(*sides, dimensions, penalty)
            embeddings = (of_x(x[held_out]), of_y(y[held_out]))
            one, other = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in embeddings)
            similarity = one @ other.T
            own = similarity.diagonal()
            return float(np.log((similarity >= own).sum(0)).mean() + np.log((similarity >= own[:, None]).sum(1)).mean())

        chosen = min(PENALTIES, key=mean_log_rank)
    return cca(x, y, dimensions, chosen)[:2]


@dataclass(frozen=True)
class _Side:
    """Standardised features."""

    mean: Float[np.ndarray, " feature"]
    std: Float[np.ndarray, " feature"]
    """1 where a feature is constant."""
    standard: Float32[np.ndarray, "row feature"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "row feature"]) -> "_Side":
        mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        std = np.where(std > 0, std, 1.0)
        return cls(mean, std, ((x - mean) / std).astype(np.float32))

    @property
    def gram(self) -> Float[np.ndarray, "feature feature"]:
        return self.product(self.standard)

    def product(self, y: Float[np.ndarray, "row output"]) -> Float[np.ndarray, "feature output"]:
        """Return the mean over rows of the products of each feature and each output."""
        return np.asarray((self.standard.T @ y.astype(np.float32)).astype(np.float64) / len(y))

    @cached_property
    def spectrum(self) -> tuple[Float[np.ndarray, " component"], Float[np.ndarray, "feature component"]]:
        """Variances and directions of the principal components."""
        variances, vectors = np.linalg.eigh(self.gram)
        return np.maximum(variances, 0), vectors


def _held_out(rows: int) -> Bool[np.ndarray, " row"]:
    return np.random.default_rng(0).permutation(rows) < math.ceil(_VALIDATION * rows)


def _solve(
    side: _Side,
    gram: Float[np.ndarray, "feature feature"],
    product: Float[np.ndarray, "feature output"],
    offset: Float[np.ndarray, " output"],
    penalty: float,
) -> Affine:
    weights = np.linalg.solve(gram + penalty * np.eye(len(gram)), product)
    return Affine(side.mean, weights / side.std[:, None], offset)


def _correlate(
    one: _Side, other: _Side, dimensions: int, penalty: float
) -> tuple[Affine, Affine, Float[np.ndarray, " dimension"]]:
    whitenings = [vectors / np.sqrt(variances + penalty) for variances, vectors in (one.spectrum, other.spectrum)]
    left, correlations, right = np.linalg.svd(
        whitenings[0].T @ one.product(other.standard) @ whitenings[1], full_matrices=False
    )
    count = min(dimensions, len(correlations))
    maps = []
    for side, whitening, rotation in zip((one, other), whitenings, (left, right.T), strict=True):
        weights = whitening @ rotation[:, :count] * correlations[:count] / side.std[:, None]
        maps.append(Affine(side.mean, weights, np.zeros(count)))
    return maps[0], maps[1], correlations[:count]


def _gradients(images: Float[np.ndarray, "row channel height width"]) -> Float[np.ndarray, "row feature"]:
    """Return the histogram of gradient directions in each cell, weighted by length, with the root of its norm taken out."""
    grey = images.mean(1)
    down, right = np.gradient(grey, axis=(1, 2))
    length = np.hypot(down, right)
    bins = np.minimum((np.arctan2(down, right) % np.pi) / np.pi * ORIENTATIONS, ORIENTATIONS - 1).astype(int)
    rows = np.arange(len(images))[:, None, None]
    cells = [np.minimum(np.arange(side) // CELL, max(0, side // CELL - 1)) for side in grey.shape[1:]]
    counts = np.zeros((len(images), cells[0].max() + 1, cells[1].max() + 1, ORIENTATIONS), np.float32)
    np.add.at(counts, (rows, cells[0][:, None], cells[1], bins), length)
    norms = np.linalg.norm(counts, axis=-1, keepdims=True)
    return np.asarray((counts / np.sqrt(norms + 1e-6)).reshape(len(images), -1))


def _colours(images: Float[np.ndarray, "row channel height width"]) -> Float[np.ndarray, "row feature"]:
    """Return the share of pixels in each bin of each channel, and, for up to three channels, in each bin of all together."""
    levels = np.minimum((images * LEVELS).astype(int), LEVELS - 1)
    channels = levels.shape[1]
    codes = [levels[:, channel] for channel in range(channels)]
    if 1 < channels <= 3:
        codes.append(sum(code * LEVELS**channel for channel, code in enumerate(codes)))
    parts: list[np.ndarray] = []
    for code in codes:
        size = LEVELS**channels if len(parts) == channels else LEVELS
        counts = np.zeros((len(images), size), np.float32)
        np.add.at(counts, (np.arange(len(images))[:, None], code.reshape(len(images), -1)), 1)
        parts.append(np.sqrt(counts / code[0].size))
    return np.concatenate(parts, axis=1)
