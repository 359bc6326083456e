"""Demo data of a bundle for the page: example inputs, and reference embeddings on a plane through the latent space."""

import io
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from concord.model import codec
from concord.model.bundle import GOLDEN, MAP, Bundle
from concord.model.codec.text import text_from_tokens
from concord.model.modality import (
    AudioModality,
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)

MAX_EXAMPLES = 16
_RIDGE = 1e-3

Means = Float[np.ndarray, "row latent"]


def describe(bundle: Bundle) -> bytes:
    """Returns the demo data as JSON.

    Returns:
        An object with

        - ``samples``: example inputs, at most ``MAX_EXAMPLES``. They are the bundle's golden examples.
        - ``map``: a ``plane`` (2, latent) through ``centre`` (latent,); the reference embeddings in it, as ``points`` (row, 2);
          and their ``labels`` (row,), or null. A bundle without reference embeddings uses the means of its golden examples.

    Raises:
        BundleError: a file of the bundle changed since it was opened.
    """
    golden = _arrays(bundle, GOLDEN)
    references = _arrays(bundle, MAP) if MAP in bundle.manifest.files else {"mean": golden["mean"]}
    mean, label = references["mean"], references.get("label")
    centre, plane = mean.mean(axis=0), find_plane(mean, label)
    return orjson.dumps(
        {
            "samples": [
                {m.name: as_input(m, golden[f"input.{m.name}"][row]) for m in bundle.manifest.modalities}
                for row in range(min(len(golden["present"]), MAX_EXAMPLES))
            ],
            "map": {
                "centre": centre.tolist(),
                "plane": plane.tolist(),
                "points": np.round((mean - centre) @ plane.T, 3).tolist(),
                "labels": None if label is None else label.tolist(),
            },
        }
    )


def find_plane(mean: Means, label: Shaped[np.ndarray, " row"] | None) -> Float[np.ndarray, "2 latent"]:
    """Returns the orthonormal axes of the plane that separates the labels best (Fisher's linear discriminant).

    Without labels, or with too few or only distinct ones, it is the plane in which the means vary most (principal components).
    The axes are orthonormal, so a projected Gaussian keeps its standard deviations along them.
    """
    mean = mean.astype(np.float64) - mean.mean(axis=0)
    scatter = mean.T @ mean
    names = [] if label is None else np.unique(label).tolist()
    if len(names) > 2 and len(names) < len(mean):  # two classes have only one discriminant axis
        assert label is not None
        within = sum(_scatter(mean[label == name]) for name in names)
        ridge = _RIDGE * np.trace(within) / len(scatter) * np.eye(len(scatter))
        values, vectors = np.linalg.eig(np.linalg.solve(within + ridge, scatter - within))
    else:
        values, vectors = np.linalg.eigh(scatter)
    axes = vectors[:, np.argsort(-values.real)[:2]].real
    orthonormal, _ = np.linalg.qr(np.pad(axes, ((0, 0), (0, 2 - axes.shape[1]))))
    return np.pad(orthonormal, ((0, 0), (0, 2 - orthonormal.shape[1]))).T


def _scatter(mean: Means) -> Float[np.ndarray, "latent latent"]:
    """Returns the scatter matrix: the covariance times the number of rows."""
    centred = mean - mean.mean(axis=0)
    return np.asarray(centred.T @ centred)


def _arrays(bundle: Bundle, name: str) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(bundle.content(name)), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def as_input(modality: Modality, array: NDArray[Any]) -> Any:
    """Returns the array of one row as a JSON value for a request."""
    if isinstance(modality, TextModality):
        return text_from_tokens(modality, array)
    if isinstance(modality, CategoricalModality):
        return modality.classes[int(array[0])]
    value = codec.render(modality, array)
    if isinstance(modality, ImageModality | AudioModality):
        return {name: value[name] for name in ("media_type", "data", "shape", "dtype") if name in value}
    if isinstance(modality, VectorModality):
        return [_shortest(number) for number in value["data"]]
    return {name: p > 0.5 for name, p in value["data"].items()} if isinstance(modality, BinaryModality) else value["data"]


def _shortest(number: float) -> float:
    """Returns the number with the fewest digits that is the same float32: 0.1 for 0.10000000149011612."""
    single = np.float32(number)
    return float(str(single)) if float(single) == number else number
