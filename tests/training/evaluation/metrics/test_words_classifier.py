"""The frozen classifier of texts by their words."""

import numpy as np

from concord.training.evaluation.metrics.words_classifier import fit_words_classifier


def test_words_classifier_follows_the_words_that_distinguish_classes() -> None:
    """Class 4 has the word 10, class 7 the word 11; None and 12 say nothing, nor does an unseen word."""
    generator = np.random.default_rng(0)
    classes = generator.choice([4, 4, 7], 200)
    texts = [(12, None, 10 if number == 4 else 11)[:: generator.choice([1, -1])] for number in classes]
    classify = fit_words_classifier(texts, classes)
    assert classify([(10,), (99, 11), (11, 12, 12), (None, 10)]).tolist() == [4, 7, 7, 4]
    assert classify([(), (99,)]).tolist() == [4, 4], "the most frequent class"
