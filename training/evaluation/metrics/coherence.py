"""Coherence: whether a generated value shows the class of the value it is generated from (Shi et al. 2019, section 4)."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from concord.model.vae.generative import Generative
from concord.training.evaluation.metrics.frozen_classifier import NO_CLASS, FrozenClassifier


def cross_coherence(
    model: Generative,
    classifiers: Mapping[str, FrozenClassifier],
    target: str,
    z: Float[Tensor, "batch latent"],
    labels: Int64[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Whether the target decoded from z shows the label.

    The decoded value is the expectation of the likelihood; of a text, the most likely characters.

    Args:
        z: samples of q(z | x_S) at temperature 1 give the coherence that the literature reports. Posterior means give the
            coherence of a service that decodes means.
    """
    return classifiers[target].classify(model.decode(target, z)) == labels


def joint_coherence(
    model: Generative, classifiers: Mapping[str, FrozenClassifier], z: Float[Tensor, "batch latent"]
) -> Bool[Tensor, " batch"]:
    """Whether all modalities with a classifier, decoded from the same z ~ p(z), show the same class.

    A row in which a classifier finds no class counts as incoherent.
    """
    classes = torch.stack([classifier.classify(model.decode(name, z)) for name, classifier in classifiers.items()])
    return (classes == classes[0]).all(0) & (classes[0] != NO_CLASS)
