"""Retrieval across modalities: how often a row is found again by an embedding from another of its modalities."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_CHUNK = 512  # queries at a time


def recall_at(
    queries: Float[np.ndarray, "row latent"], gallery: Float[np.ndarray, "row latent"], ranks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries whose own row is among the k nearest of the gallery, by cosine similarity, for each k of ``ranks``.

    By chance it is k / rows. A tie counts against the query: embeddings that are all the same find nothing.

    Args:
        queries, gallery: embeddings of the same rows in the same order, from two different modalities.

    Returns:
        fractions in [0, 1]; 1 where k is the number of rows or more.

    Raises:
        ValueError: no rows.
    """
    if len(queries) == 0:
        raise ValueError("retrieval needs rows, received none")
    found, among = _normalised(queries), _normalised(gallery)
    places = []
    for start in range(0, len(found), _CHUNK):
        own = np.arange(start, min(start + _CHUNK, len(found)))
        similarity = found[own] @ among.T
        places.append((similarity >= similarity[np.arange(len(own)), own, np.newaxis]).sum(axis=1))  # 1: the nearest
    place = np.concatenate(places)
    return {k: float(np.mean(place <= k)) for k in ranks}


def _normalised(vectors: Float[np.ndarray, "row latent"]) -> Float[np.ndarray, "row latent"]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float64).tiny))
