"""Coherence: does what is generated show the class of what it is generated from? (Shi et al. 2019, section 4)"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from model.vae.generative import Generative
from training.metrics.judge import REFUSED, Judge


def cross_coherence(
    model: Generative,
    judges: Mapping[str, Judge],
    target: str,
    z: Float[Tensor, "batch latent"],
    labels: Int64[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Whether the target decoded from z shows the label: the decoder's expectation, for a text its likeliest characters.

    With z sampled from q(z | x_S) at temperature 1 the mean over rows is what the literature reports; with z the posterior's
    mean it is what a service shows that decodes means.
    """
    return judges[target].classify(model.decode(target, z)) == labels


def joint_coherence(model: Generative, judges: Mapping[str, Judge], z: Float[Tensor, "batch latent"]) -> Bool[Tensor, " batch"]:
    """Whether all judged modalities decoded from one z ~ p(z) show the same class; what shows none agrees with nothing."""
    classes = torch.stack([judge.classify(model.decode(name, z)) for name, judge in judges.items()])
    return (classes == classes[0]).all(0) & (classes[0] != REFUSED)
