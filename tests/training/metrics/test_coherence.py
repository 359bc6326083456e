"""A perfect judge, a blind one, and a model that shows in every modality the sign of z."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.metrics.linear import Linear
from training.metrics.coherence import cross_coherence, joint_coherence

ROWS = 4000


class Sign:
    """Class 1 where the first number is above zero."""

    def classify(self, values: Tensor) -> Tensor:
        return (values[:, 0] > 0).long()


class Opposite(Sign):
    def classify(self, values: Tensor) -> Tensor:
        return 1 - super().classify(values)


class Blind:
    """Tells classes by chance."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def classify(self, values: Tensor) -> Tensor:
        return torch.randint(2, (len(values),), generator=self._generator)


class Speechless:
    def classify(self, values: Tensor) -> Tensor:
        return torch.full((len(values),), -1)


@pytest.fixture
def model() -> Linear:
    made = Linear()
    for decoder in made.decoders.values():
        decoder.weight.data.zero_()
        decoder.weight.data[0, 0] = 1.0
    return made


@pytest.fixture
def z() -> Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))


def test_cross_coherence(model: Linear, z: Tensor) -> None:
    labels = (z[:, 0] > 0).long()
    judges: dict[str, Any] = {"a": Sign(), "b": Opposite()}
    assert cross_coherence(model, judges, "a", z, labels).all()
    assert not cross_coherence(model, judges, "b", z, labels).any()
    blind = cross_coherence(model, {"a": Blind()}, "a", z, labels).float().mean()
    assert abs(blind - 0.5) < 5 * (0.25 / ROWS) ** 0.5
    assert not cross_coherence(model, {"a": Speechless()}, "a", z, labels).any()


def test_joint_coherence(model: Linear, z: Tensor) -> None:
    assert joint_coherence(model, {"a": Sign(), "b": Sign()}, z).all()
    assert not joint_coherence(model, {"a": Sign(), "b": Opposite()}, z).any()
    assert not joint_coherence(model, {"a": Speechless(), "b": Speechless()}, z).any()  # agreeing on nothing is no agreement
    blind = joint_coherence(model, {"a": Sign(), "b": Blind()}, z).float().mean()
    assert abs(blind - 0.5) < 5 * (0.25 / ROWS) ** 0.5
