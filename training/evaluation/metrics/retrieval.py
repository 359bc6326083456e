"""Cross-modal retrieval: how often a row is found by its embedding from another modality."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

_CHUNK = 512
"""Queries per step."""


def recall_at(
    queries: Float[np.ndarray, "row latent"], gallery: Float[np.ndarray, "row latent"], at: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries whose row is among the k nearest of the gallery by cosine similarity, for each k of ``at``.

    The chance level is k / rows. Ties count against the query: if all embeddings are equal, recall is 0 below k = rows.

    Args:
        queries, gallery: embeddings of the same rows in the same order, from two different modalities.

    Returns:
        fractions in [0, 1]; 1 if k is at least the number of rows.

    Raises:
        ValueError: no rows.
    """
    rank = ranks(queries, gallery)
    return {k: float(np.mean(rank <= k)) for k in at}


def ranks(
    queries: Float[np.ndarray, "query latent"],
    gallery: Float[np.ndarray, "row latent"],
    own: Int64[np.ndarray, " query"] | None = None,
) -> Int64[np.ndarray, " query"]:
    """Return the rank of each query's row in the gallery, from 1, by cosine similarity. See ``recall_at``.

    Args:
        own: index in the gallery of each query's row. None: queries and gallery have the same rows in the same order.
    """
    own = np.arange(len(queries)) if own is None else own
    if len(queries) == 0:
        raise ValueError("retrieval needs rows, received none")
    queries, gallery = _normalise(queries), _normalise(gallery)
    chunks = []
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        similarity = queries[part] @ gallery.T
        matching = similarity[np.arange(len(similarity)), own[part], np.newaxis]
        chunks.append((similarity >= matching).sum(axis=1))
    return np.concatenate(chunks).astype(np.int64)


def _normalise(vectors: Float[np.ndarray, "vector latent"]) -> Float[np.ndarray, "vector latent"]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float64).tiny))
