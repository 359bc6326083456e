"""Encoder and decoder networks: shapes for every kind of modality and for images of unusual sizes, and what they depend on."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.model.vae import token_likelihood
from concord.model.vae.likelihood import log_likelihood
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.networks import ModalityModules, NetworkSizes, ResidualBlock, decoder, encoder, initialise

SIZES = NetworkSizes(latent=4, features=5, hidden=6, width=4)


def check_networks(modality: Modality, raw_shape: tuple[int, ...], width: int = 2, blocks: int = 0) -> None:
    """Check the output shapes of both networks, and that each row of the output depends on its own input only."""
    dtype = torch.int64 if isinstance(modality, TextModality | CategoricalModality) else torch.float32
    x = torch.zeros(3, *modality.shape, dtype=dtype)
    features = encoder(modality, replace(SIZES, width=width, blocks=blocks))(x)
    assert features.shape == (3, 5)
    z = torch.randn(3, 4, requires_grad=True)
    raw = decoder(modality, replace(SIZES, width=width, blocks=blocks))(z)
    assert raw.shape == (3, *raw_shape)
    (gradient,) = torch.autograd.grad(raw[1].sum(), z)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("side", [(28, 28), (32, 32), (37, 21), (64, 64), (5, 90), (2, 2), (300, 200)])
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("blocks", [0, 1])
def test_networks_images_of_any_size_have_the_right_shapes(side: tuple[int, int], channels: int, blocks: int) -> None:
    modality = ImageModality(name="picture", channels=channels, height=side[0], width=side[1])
    check_networks(modality, modality.shape, blocks=blocks)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40), blocks=st.integers(0, 2))
def test_networks_images_of_random_size_have_the_right_shapes(height: int, width: int, blocks: int) -> None:
    modality = ImageModality(name="picture", channels=1, height=height, width=width)
    check_networks(modality, modality.shape, width=1, blocks=blocks)


@pytest.mark.parametrize("side", [64, 96])
def test_networks_with_the_logistic_mixture_have_its_parameters(side: int) -> None:
    modality = ImageModality(name="picture", channels=3, height=side, width=side, likelihood="logistic_mixture", components=2)
    check_networks(modality, (2 * 7, side, side), blocks=2)


def test_residual_block_starts_as_the_identity_and_learns() -> None:
    block, x = ResidualBlock(6), torch.randn(2, 6, 5, 4)
    initialise(block)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.outer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_networks_with_blocks_treat_a_row_alike_in_any_batch(network: str) -> None:
    modality = ImageModality(name="picture", channels=3, height=20, width=16)
    if network == "encoder":
        trunk, rows = encoder(modality, replace(SIZES, blocks=2)), torch.rand(64, *modality.shape)
    else:
        trunk, rows = decoder(modality, replace(SIZES, blocks=2)), torch.randn(64, 4)
    torch.testing.assert_close(torch.cat([trunk(rows[i : i + 1]) for i in range(64)]), trunk(rows), rtol=1e-4, atol=1e-5)
    assert trunk.train()(rows).equal(trunk.eval()(rows)), "no statistics of the batch"


@pytest.mark.parametrize("blocks", [0, 1])
def test_decoder_of_pictures_with_a_white_background_does_not_learn_to_ignore_z(blocks: int) -> None:
    """The first steps all make pixels brighter. A decoder with blocks and no normalisation became constant in ten of them."""
    torch.manual_seed(0)
    modality = ImageModality(name="photo", channels=3, height=40, width=30, likelihood="laplace")
    network = decoder(modality, NetworkSizes(latent=16, features=16, hidden=64, width=32, blocks=blocks))
    initialise(network)
    z = torch.randn(32, 16)
    pictures = torch.ones(32, *modality.shape)
    pictures[z[:, 0] > 0, :, 10:30, 8:22] = 0.2
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        (-log_likelihood(modality, network(z), pictures).mean()).backward()
        optimizer.step()
    assert torch.sigmoid(network(z)).std(0).mean() > 0.01


def test_networks_have_the_blocks_of_every_resolution() -> None:
    modality = ImageModality(name="picture", channels=3, height=32, width=32)
    for network in (
        encoder(modality, replace(SIZES, blocks=2)),
        decoder(modality, replace(SIZES, blocks=2)),
    ):
        blocks = [m.inner.out_channels for m in network.modules() if isinstance(m, ResidualBlock)]
        assert sorted(blocks) == [4, 4, 8, 8, 16, 16]


def test_decoder_learned_scale_starts_at_that_of_the_modality_and_stays_positive() -> None:
    for choice, scales in (("modality", 1), ("channel", 3)):
        modality = ImageModality(name="picture", channels=3, height=8, width=8, scale=0.4, learned_scale=choice)
        network = decoder(modality, replace(SIZES, width=2))
        assert network.log_scale.shape == (scales, 1, 1)
        torch.testing.assert_close(network.log_scale.exp(), torch.full((scales, 1, 1), 0.4))
        nn.init.constant_(network.scale, -100.0)
        torch.testing.assert_close(network.log_scale.exp(), torch.full((scales, 1, 1), 1 / 256))
    assert decoder(ImageModality(name="picture", channels=3, height=8, width=8), SIZES).log_scale is None


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
def test_networks_of_other_kinds_have_the_right_shapes(modality: Modality, raw_shape: tuple[int, ...]) -> None:
    check_networks(modality, raw_shape)


@pytest.mark.parametrize(
    ("side", "top", "left"), [((28, 28), 2, 2), ((37, 21), 1, 1), ((16, 16), 0, 0), ((9, 6), 0, 0), ((9, 7), 0, 0)]
)
@pytest.mark.parametrize("blocks", [0, 1])
def test_decoder_crops_the_middle_of_its_grid(side: tuple[int, int], top: int, left: int, blocks: int) -> None:
    modality = ImageModality(name="picture", channels=1, height=side[0], width=side[1])
    network = decoder(modality, replace(SIZES, width=2, blocks=blocks))
    z = torch.randn(2, 4)
    grid = network.layers(z)
    assert torch.equal(network(z), grid[:, :, top : top + side[0], left : left + side[1]])
    assert (grid.shape[2] - side[0]) // 2 == top
    assert (grid.shape[3] - side[1]) // 2 == left


@pytest.mark.parametrize("blocks", [0, 1])
def test_encoder_depends_on_every_pixel(blocks: int) -> None:
    modality = ImageModality(name="picture", channels=1, height=28, width=20)
    x = torch.randn(1, *modality.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(modality, replace(SIZES, width=2, blocks=blocks))(x).sum(), x)
    assert torch.all(gradient != 0)


def test_encoder_distinguishes_all_texts_of_characters() -> None:
    modality = TextModality(name="word", length=2, alphabet=" abc")
    network = encoder(modality, replace(SIZES, width=1))
    words = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert len(torch.unique(network(words), dim=0)) == 16


def test_encoder_of_words_depends_on_order_but_not_on_position() -> None:
    modality = TextModality(name="title", length=6, unit="word", vocabulary=("a", "b"))
    network = encoder(modality, replace(SIZES, width=1))
    texts = torch.tensor([[2, 3, 2, 3, 0, 0], [2, 2, 3, 3, 0, 0], [2, 3, 0, 0, 0, 0], [2, 3, 3, 0, 0, 0], [1, 3, 0, 0, 0, 0]])
    assert len(torch.unique(network(texts), dim=0)) == len(texts)
    torch.testing.assert_close(network(torch.tensor([[0, 2, 3, 0, 0, 0]])), network(torch.tensor([[0, 0, 2, 3, 0, 0]])))


def test_encoder_of_large_images_limits_the_channels() -> None:
    modality = ImageModality(name="picture", channels=3, height=256, width=256)
    convolutions = [m for m in encoder(modality, SIZES).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 16, 32, 32, 32]


def test_encoder_channels_double_at_every_halving() -> None:
    modality = ImageModality(name="picture", channels=3, height=32, width=32)
    convolutions = [m for m in encoder(modality, SIZES).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 8, 16]


ATTRIBUTES = [name for name in dir(nn.ModuleDict()) if name[0] != "_" and name == name.lower()]
NAMES = st.sampled_from(ATTRIBUTES) | st.from_regex(r"^[a-z][a-z0-9_]{0,63}$", fullmatch=True)


@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True))
@example(names=ATTRIBUTES)
def test_modality_modules_of_any_names_behave_like_a_dictionary(names: list[str]) -> None:
    layers = {name: nn.Linear(1, 1) for name in names}
    modules = ModalityModules(layers)
    assert list(modules) == list(modules.keys()) == names
    assert dict(modules.items()) == layers
    assert list(modules.values()) == [modules[name] for name in names] == list(layers.values())
    assert len(modules) == len(list(modules.parameters())) / 2 == len(names)
    assert all(name in modules for name in names)
    assert "absent" not in modules or "absent" in names
    assert modules.train().training
    assert not copy.deepcopy(modules).eval()[names[0]].training
    copied = ModalityModules({name: nn.Linear(1, 1) for name in names})
    copied.load_state_dict(modules.state_dict())
    assert all(torch.equal(copied[name].weight, layers[name].weight) for name in names)
    del modules[names[0]]
    assert list(modules) == names[1:]


def test_modality_modules_keep_the_names_of_weights() -> None:
    """Checkpoints and bundles of older versions hold them."""
    layers = {name: nn.Linear(1, 1) for name in ("photo", "title", "word_2")}
    assert list(ModalityModules(layers).state_dict()) == list(nn.ModuleDict(layers).state_dict())


@settings(max_examples=3)
@given(names=st.lists(NAMES, min_size=2, max_size=4, unique=True), fusion=st.sampled_from(["set", "product"]))
@example(names=["training", "items", "type", "values"], fusion="product")
def test_model_with_modalities_of_any_names_is_trained_and_traced(names: list[str], fusion: str) -> None:
    """Tracing, as the export does, looks weights up by their names."""
    modalities = [VectorModality(name=name, size=1) for name in names]
    vae = MultimodalVAE(modalities, SIZES, beta=1.0, fusion=fusion)
    posterior = vae.aligned({name: torch.randn(5, 1) for name in names}, torch.ones(5, len(names), dtype=torch.bool))
    vae.decode(names[0], posterior.mean).sum().backward()
    assert all(trunk[0].weight.grad is not None for trunk in vae.aligned.trunks.values())
    decoders, z = _Decode(vae), torch.randn(5, SIZES.latent)
    assert torch.equal(torch.export.export(decoders, (z,), strict=False).module()(z), decoders(z))


class _Decode(nn.Module):
    def __init__(self, vae: MultimodalVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.vae.decode(m.name, z) for m in self.vae.modalities], dim=1)


@pytest.mark.parametrize(("side", "channels"), [((40, 30), 3), ((7, 5), 1), ((2, 2), 4)])
def test_image_decoder_last_layer_equals_a_transposed_convolution(side: tuple[int, int], channels: int) -> None:
    modality = ImageModality(name="picture", channels=channels, height=side[0], width=side[1])
    layer = decoder(modality, replace(SIZES, width=16)).layers[-1]
    x = torch.randn(3, 16, 5, 4, dtype=torch.float64, requires_grad=True)
    layer.double()
    actual, expected = layer(x), nn.ConvTranspose2d.forward(layer, x)
    torch.testing.assert_close(actual, expected)
    upstream, inputs = torch.randn_like(expected), [x, layer.weight, layer.bias]
    for gradient, reference in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(gradient, reference)
    assert layer(x[:0]).shape == expected[:0].shape


def test_words_decoder_log_likelihood_equals_that_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are more than one chunk. The gradients are those of z and of all weights."""
    monkeypatch.setattr(token_likelihood, "CHUNK_BYTES", 4 * 9 * 5)  # 5 of 21 positions
    modality = TextModality(name="title", length=3, unit="word", vocabulary=tuple("abcdefg"))
    network = decoder(modality, replace(SIZES, width=2))
    z, tokens = torch.randn(7, 4, requires_grad=True), torch.randint(9, (7, 3))
    inputs = [z, *network.parameters()]
    actual, expected = network.log_likelihood(z, tokens), log_likelihood(modality, network(z), tokens)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(7)
    for gradient, reference in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(gradient, reference)
    _, pullback = torch.func.vjp(lambda z: network.log_likelihood(z, tokens), z.detach())
    torch.testing.assert_close(pullback(upstream)[0], torch.autograd.grad(network.log_likelihood(z, tokens), z, upstream)[0])
    assert network.log_likelihood(z, torch.full_like(tokens, 10**9)).isfinite().all()
