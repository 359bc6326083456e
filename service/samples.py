"""What a bundle has for people to look at: rows to start from, and a plane through the latent space to find them in."""

import io
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

from model import codec
from model.bundle import GOLDEN, MAP, Bundle
from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality
from model.text import text_from_tokens

MOST_SAMPLES = 16
_RIDGE = 1e-3

Means = Float[np.ndarray, "row latent"]


def describe(bundle: Bundle) -> bytes:
    """JSON: ``samples``, rows as a call takes them, which are the bundle's golden examples; and ``map``, the ``plane``
    (2, latent) and its ``centre`` (latent,) with ``points`` (row, 2) in it and their ``labels``, or null.

    Raises:
        BundleError: a file of the bundle was changed since it was opened.
    """
    golden = _arrays(bundle, GOLDEN)
    landmarks = _arrays(bundle, MAP) if MAP in bundle.manifest.files else {"mean": golden["mean"]}
    mean, label = landmarks["mean"], landmarks.get("label")
    centre, plane = mean.mean(axis=0), find_plane(mean, label)
    return orjson.dumps(
        {
            "samples": [
                {m.name: as_input(m, golden[f"input.{m.name}"][row]) for m in bundle.manifest.modalities}
                for row in range(min(len(golden["present"]), MOST_SAMPLES))
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
    """Orthonormal axes of the plane that parts the labels best (Fisher's discriminant), or, without labels, of the one in which
    the means vary most (principal components). A Gaussian keeps its standard deviations in it."""
    mean = mean.astype(np.float64) - mean.mean(axis=0)
    scatter = mean.T @ mean
    names = [] if label is None else np.unique(label).tolist()
    if len(names) > 2 and len(names) < len(mean):  # fewer classes span no plane
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
    centred = mean - mean.mean(axis=0)
    return np.asarray(centred.T @ centred)


def _arrays(bundle: Bundle, name: str) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(bundle.content(name)), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def as_input(modality: Modality, array: NDArray[Any]) -> Any:
    """The value of one row, an array as training reads it, as a call takes it."""
    if isinstance(modality, TextModality):
        return text_from_tokens(modality, array)
    if isinstance(modality, CategoricalModality):
        return modality.classes[int(array[0])]
    value = codec.encode(modality, array)
    if isinstance(modality, ImageModality):
        return {name: value[name] for name in ("media_type", "data", "shape", "dtype") if name in value}
    return {name: p > 0.5 for name, p in value["data"].items()} if isinstance(modality, BinaryModality) else value["data"]
