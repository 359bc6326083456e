"""Coherence of a model whose modalities show the sign of z, with perfect, inverted, random and silent classifiers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from concord.training.evaluation.metrics.coherence import cross_coherence, joint_coherence
from tests.support.linear import Linear

ROWS = 4000


class Sign:
    """Class 1 if the first number is positive, else class 0."""

    def classify(self, values: Tensor) -> Tensor:
        return (values[:, 0] > 0).long()


class InvertedSign(Sign):
    def classify(self, values: Tensor) -> Tensor:
        return 1 - super().classify(values)


class RandomClass:
    """A random class."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def classify(self, values: Tensor) -> Tensor:
        return torch.randint(2, (len(values),), generator=self._generator)


class NoClass:
    """No class for any value."""

    def classify(self, values: Tensor) -> Tensor:
        return torch.full((len(values),), -1)


@pytest.fixture
def model() -> Linear:
    model = Linear()
    for decoder in model.decoders.values():
        decoder.weight.data.zero_()
        decoder.weight.data[0, 0] = 1.0
    return model


@pytest.fixture
def z() -> Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))


def test_cross_coherence_is_agreement_with_the_label(model: Linear, z: Tensor) -> None:
    labels = (z[:, 0] > 0).long()
    classifiers: dict[str, Any] = {"a": Sign(), "b": InvertedSign()}
    assert cross_coherence(model, classifiers, "a", z, labels).all()
    assert not cross_coherence(model, classifiers, "b", z, labels).any()
    accuracy = cross_coherence(model, {"a": RandomClass()}, "a", z, labels).float().mean()
    assert abs(accuracy - 0.5) < 5 * (0.25 / ROWS) ** 0.5
    assert not cross_coherence(model, {"a": NoClass()}, "a", z, labels).any()


def test_joint_coherence_is_agreement_of_all_modalities(model: Linear, z: Tensor) -> None:
    assert joint_coherence(model, {"a": Sign(), "b": Sign()}, z).all()
    assert not joint_coherence(model, {"a": Sign(), "b": InvertedSign()}, z).any()
    assert not joint_coherence(model, {"a": NoClass(), "b": NoClass()}, z).any()  # NO_CLASS is not agreement
    accuracy = joint_coherence(model, {"a": Sign(), "b": RandomClass()}, z).float().mean()
    assert abs(accuracy - 0.5) < 5 * (0.25 / ROWS) ** 0.5
