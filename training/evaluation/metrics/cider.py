"""CIDEr-D: how much a text shares with several reference texts of the same thing, and little with those of other things."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Words = Sequence[Hashable]
Ngram = tuple[Hashable, ...]
LONGEST = 4
"""Words of the longest n-gram."""
SIGMA = 6.0
"""Standard deviation, in words, of the penalty of another length than that of the reference."""
SCALE = 10.0


class _Vector(NamedTuple):
    """The n-grams of a text."""

    weights: list[dict[Ngram, float]]
    """By n: the number of each, times its inverse document frequency."""
    norms: list[float]
    words: int


class CiderD:
    """Scores texts by the references of each row.

    The score of a row is the mean over n = 1 ... 4 and over its references of the cosine between the counts of n-grams, each
    weighted by its inverse document frequency. A document is all references of a row. A repeated n-gram counts at most as often
    as in the reference, and another length is penalised, so no repetition pays.

    Source: Vedantam, Zitnick & Parikh 2015 (CIDEr-D, section 5); sigma and the factor 10 are those of the COCO server.

    Args:
        references: of each row, at least one.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        counts = [[_ngrams(text) for text in texts] for texts in references]
        self._rows = math.log(max(1, len(references)))
        self._documents = Counter(ngram for texts in counts for ngram in set().union(*texts))
        self._references = [[self._vector(of_text) for of_text in texts] for texts in counts]

    def __call__(self, candidates: Sequence[Words]) -> Float[np.ndarray, " row"]:
        """Return the score of one text for each row: 0 to 10."""
        vectors = [self._vector(_ngrams(text)) for text in candidates]
        pairs = zip(vectors, self._references, strict=True)
        return np.array([np.mean([_similarity(vector, other) for other in references]) for vector, references in pairs])

    def _vector(self, counts: Counter[Ngram]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (self._rows - math.log(max(1, self._documents[ngram])))
        norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 1))


def _ngrams(text: Words) -> Counter[Ngram]:
    return Counter(tuple(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) - n + 1))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((candidate.words - reference.words) ** 2) / (2 * SIGMA**2))
    cosines = 0.0
    for n in range(LONGEST):
        others = reference.weights[n]
        shared = sum(
            min(weight, others[ngram]) * others[ngram] for ngram, weight in candidate.weights[n].items() if ngram in others
        )
        cosines += shared / (candidate.norms[n] * reference.norms[n]) if shared else 0.0
    return SCALE * penalty * cosines / LONGEST
