"""A frozen classifier of texts by their words, which labels generated texts. It is independent of the model that it scores."""

import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Integer

_PENALTY = 10.0
"""Inverse strength of the L2 penalty."""
_STEPS = 100


def fit_words_classifier(
    texts: Sequence[Sequence[Hashable]], classes: Integer[np.ndarray, " text"]
) -> Callable[[Sequence[Sequence[Hashable]]], Integer[np.ndarray, " other"]]:
    """Return logistic regression on the words of texts, each present or not, as a function from texts to class numbers.

    Args:
        texts: the words of each training text.
        classes: their class numbers, at least two different ones.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # noqa: PLC0415 - 110 MiB, which most commands do without
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415

    words = CountVectorizer(analyzer=lambda text: map(repr, text), binary=True)
    model = make_pipeline(words, LogisticRegression(C=_PENALTY, max_iter=_STEPS, tol=1e-3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # the last digits of the weights do not matter
        model.fit(texts, classes)
    return lambda others: np.asarray(model.predict(others))
