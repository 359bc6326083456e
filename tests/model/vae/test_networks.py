"""Shapes in, shapes out, for every kind and for pictures of awkward sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from model.vae.networks import decoder, encoder


def check(modality: Modality, raw_shape: tuple[int, ...], width: int = 2) -> None:
    """Both networks fit the modality, and something of every output can be reached from the input."""
    kind = torch.int64 if isinstance(modality, TextModality | CategoricalModality) else torch.float32
    x = torch.zeros(3, *modality.shape, dtype=kind)
    features = encoder(modality, features=5, width=width)(x)
    assert features.shape == (3, 5)
    z = torch.randn(3, 4, requires_grad=True)
    raw = decoder(modality, latent=4, hidden=6, width=width)(z)
    assert raw.shape == (3, *raw_shape)
    (slope,) = torch.autograd.grad(raw[1].sum(), z)
    assert slope[1].abs().sum() > 0
    assert slope[[0, 2]].abs().sum() == 0  # rows never mix


@pytest.mark.parametrize("side", [(28, 28), (32, 32), (37, 21), (64, 64), (5, 90), (2, 2), (300, 200)])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_pictures_of_any_size(side: tuple[int, int], channels: int) -> None:
    modality = ImageModality(name="picture", channels=channels, height=side[0], width=side[1])
    check(modality, modality.shape)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40))
def test_pictures_drawn_at_random(height: int, width: int) -> None:
    modality = ImageModality(name="picture", channels=1, height=height, width=width)
    check(modality, modality.shape, width=1)


@pytest.mark.parametrize(
    ("modality", "raw_shape"),
    [
        (TextModality(name="word", length=3, alphabet=" ab"), (3, 3)),
        (TextModality(name="letter", length=1, alphabet=" a"), (1, 2)),
        (TextModality(name="title", length=3, unit="word", vocabulary=("a", "b")), (3, 4)),
        (CategoricalModality(name="brand", classes=("a", "b", "c")), (1, 3)),
        (VectorModality(name="numbers", size=7), (7,)),
        (VectorModality(name="number", size=1), (1,)),
        (BinaryModality(name="traits", attributes=("a", "b")), (2,)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_kinds(modality: Modality, raw_shape: tuple[int, ...]) -> None:
    check(modality, raw_shape)


@pytest.mark.parametrize(
    ("side", "top", "left"), [((28, 28), 2, 2), ((37, 21), 1, 1), ((16, 16), 0, 0), ((9, 6), 0, 0), ((9, 7), 0, 0)]
)
def test_the_picture_is_the_middle_of_its_grid(side: tuple[int, int], top: int, left: int) -> None:
    modality = ImageModality(name="picture", channels=1, height=side[0], width=side[1])
    network = decoder(modality, latent=4, hidden=6, width=2)
    z = torch.randn(2, 4)
    grid = network.layers(z)
    assert torch.equal(network(z), grid[:, :, top : top + side[0], left : left + side[1]])
    assert (grid.shape[2] - side[0]) // 2 == top
    assert (grid.shape[3] - side[1]) // 2 == left


def test_every_pixel_is_seen() -> None:
    modality = ImageModality(name="picture", channels=1, height=28, width=20)
    x = torch.randn(1, *modality.shape, requires_grad=True)
    (slope,) = torch.autograd.grad(encoder(modality, features=5, width=2)(x).sum(), x)
    assert torch.all(slope != 0)


def test_every_character_is_told_apart() -> None:
    modality = TextModality(name="word", length=2, alphabet=" abc")
    network = encoder(modality, features=8, width=1)
    words = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert len(torch.unique(network(words), dim=0)) == 16


def test_words_count_and_so_do_their_neighbours_and_not_their_place() -> None:
    modality = TextModality(name="title", length=6, unit="word", vocabulary=("a", "b"))
    network = encoder(modality, features=8, width=1)
    texts = torch.tensor([[2, 3, 2, 3, 0, 0], [2, 2, 3, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 3, 3, 0, 0, 0], [1, 3, 0, 0, 0, 0]])
    assert len(torch.unique(network(texts), dim=0)) == len(texts)
    torch.testing.assert_close(network(torch.tensor([[0, 2, 3, 0, 0, 0]])), network(torch.tensor([[0, 0, 2, 3, 0, 0]])))


def test_large_pictures_stop_widening() -> None:
    modality = ImageModality(name="picture", channels=3, height=256, width=256)
    convolutions = [m for m in encoder(modality, features=5, width=4).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32, 32]


def test_width_doubles_at_every_halving() -> None:
    modality = ImageModality(name="picture", channels=3, height=32, width=32)
    convolutions = [m for m in encoder(modality, features=5, width=4).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 16]
