"""Encoder trunks (x_m -> features) and decoders (z -> raw output) for each kind of modality.

A spectrogram has the networks of a grey image.
"""

import math
from collections.abc import ItemsView, Iterator, KeysView
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from concord.model.modality import AudioModality, CategoricalModality, ImageModality, Modality, TextModality
from concord.model.vae.likelihood import raw_channels
from concord.model.vae.masked import is_tracing
from concord.model.vae.sequence_decoder import SequenceDecoder
from concord.model.vae.token_likelihood import token_log_likelihood

SILU_GAIN = 1.7  # 1 / sqrt(E[SiLU(x)^2]) for standard normal x, rounded: keeps the variance of signals from layer to layer
MIN_NORMALISED = 8  # pixels: the normalised values of fewer ones hardly depend on z
MIN_SIDE = 4  # pixels: convolutions halve an image until its shorter side has about this size
MAX_DOUBLINGS = 3  # of the channels; without a limit, images above 90 pixels per side would need networks of gigabytes
GROUPS = 8  # group normalisation in image networks, per row (Wu & He 2018)
SCALE_GAIN = 10.0  # change of the logarithm of a learned scale with its weight, which Adam moves by about the learning rate
MIN_SCALE = 1 / 256  # of a learned scale: the distance of two levels of a pixel; without a bound, flat images drive it to 0
WORD_FEATURES = 64  # size of a word's vector, in the encoder and in the decoder


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of the encoders and decoders of a model."""

    latent: int
    """Dimensions of z."""
    features: int
    """Outputs of the encoder trunk of one modality."""
    hidden: int
    """Units of the hidden layers of fusion and decoders."""
    width: int
    """Channels of an image network at the resolution of the image. They double at each halving, at most ``MAX_DOUBLINGS``
    times."""
    blocks: int = 0
    """Residual blocks at each resolution of an image network below that of the image."""
    shallow: bool = False
    """Whether numbers, attributes, classes and characters pass one encoder layer instead of two, and fusions are linear."""


class ModalityModules(nn.ModuleDict):
    """Modules by modality. A modality may have the name of an attribute of ``nn.ModuleDict``, such as ``type`` or ``training``,
    which ``nn.ModuleDict`` rejects as a key: such a module is stored under another key. All other keys, and so the names of the
    weights, are those of ``nn.ModuleDict``.
    """

    _PREFIX = "modality-"  # no attribute and no modality has a hyphen in its name
    _ATTRIBUTES = frozenset(dir(nn.ModuleDict()))

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(self._stored(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(self._stored(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(self._stored(key))

    def __contains__(self, key: str) -> bool:
        return super().__contains__(self._stored(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def keys(self) -> KeysView[str]:
        return self._by_name().keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return self._by_name().items()

    def _by_name(self) -> dict[str, nn.Module]:
        return {key.removeprefix(self._PREFIX): module for key, module in self._modules.items() if module is not None}

    def _stored(self, key: str) -> str:
        return self._PREFIX + key if key in self._ATTRIBUTES else key


def encoder(modality: Modality, sizes: NetworkSizes) -> nn.Module:
    """Encoder trunk of a modality: network from (batch, *shape) to (batch, features)."""
    features, shallow = sizes.features, sizes.shallow
    if isinstance(modality, ImageModality | AudioModality):
        return image_encoder(modality, features, sizes.width, sizes.blocks)
    if isinstance(modality, TextModality) and modality.unit != "character":
        return _WordsEncoder(modality, features)
    if isinstance(modality, TextModality | CategoricalModality):
        values = math.prod(modality.shape) * modality.categories
        return nn.Sequential(_OneHot(modality.categories), *_layers(values, features, shallow), nn.SiLU())
    return nn.Sequential(*_layers(math.prod(modality.shape), features, shallow), nn.SiLU())


def decoder(modality: Modality, sizes: NetworkSizes) -> nn.Module:
    """Decoder of a modality: network from z (batch, latent) to the raw output of ``likelihood``, (batch, *shape), for text and
    classes (batch, *shape, category). Of a text with the autoregressive likelihood: a ``SequenceDecoder``.
    """
    if isinstance(modality, ImageModality | AudioModality):
        return ImageDecoder(modality, sizes)
    latent, hidden = sizes.latent, sizes.hidden
    shape = modality.shape
    if isinstance(modality, TextModality) and modality.likelihood == "autoregressive":
        return SequenceDecoder(modality, latent, hidden)
    if isinstance(modality, TextModality) and modality.unit == "word":
        return WordsDecoder(
            nn.Linear(latent, hidden),
            nn.SiLU(),
            *_perceptron(hidden, modality.length * WORD_FEATURES, hidden),
            nn.SiLU(),
            nn.Unflatten(1, (modality.length, WORD_FEATURES)),
            nn.Flatten(0, 1),  # all positions share the output layer
            nn.Linear(WORD_FEATURES, modality.categories),
            nn.Unflatten(0, (-1, modality.length)),
        )
    if isinstance(modality, TextModality | CategoricalModality):
        shape = (*shape, modality.categories)
    return nn.Sequential(
        nn.Linear(latent, hidden), nn.SiLU(), *_perceptron(hidden, math.prod(shape), hidden), nn.Unflatten(1, shape)
    )


def initialise(network: nn.Module, last: float = 1.0) -> None:
    """Initialise all weights with normal samples that keep the standard deviation of signals from layer to layer. Biases are 0.

    PyTorch's default shrinks signals by half or more in each layer that a SiLU follows. A decoder that starts with outputs this
    small learns to ignore z before z carries information, and the model does not recover. Residual blocks start as the
    identity. A ``SequenceDecoder`` initialises itself.

    Args:
        last: standard deviation of the last layer's output.
    """
    if isinstance(network, SequenceDecoder):
        network.initialise()
        return
    layers = [m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    for layer in layers:
        # A transposed convolution with kernel 4 and stride 2 sums 2 x 2 positions in each output.
        inputs = layer.in_channels * 4 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
        gain = last if layer is layers[-1] else SILU_GAIN
        nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            nn.init.zeros_(block.outer.weight)


def _perceptron(inputs: int, outputs: int, hidden: int = 0) -> tuple[nn.Module, ...]:
    hidden = hidden or outputs
    return nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs)


def _layers(inputs: int, outputs: int, shallow: bool) -> tuple[nn.Module, ...]:
    return (nn.Linear(inputs, outputs),) if shallow else _perceptron(inputs, outputs)


def _halvings(modality: ImageModality | AudioModality) -> int:
    return max(1, round(math.log2(min(modality.shape[1:]) / MIN_SIDE)))


def _channels(width: int, level: int) -> int:
    return width << min(level, MAX_DOUBLINGS)


def image_encoder(modality: ImageModality | AudioModality, features: int, width: int, blocks: int = 0) -> nn.Module:
    """Encoder trunk of an image or a spectrogram, see ``NetworkSizes``: (batch, channel, height, width) to (batch, feature)."""
    layers: list[nn.Module] = []
    channels, height, side = modality.shape
    for level in range(_halvings(modality)):
        after = _channels(width, level)
        norm = _GroupNorm(after)
        layers += [nn.Conv2d(channels, after, kernel_size=4, stride=2, padding=1), norm, nn.SiLU()]
        layers += [ResidualBlock(after) for _ in range(blocks)]
        channels, height, side = after, height // 2, side // 2
    return nn.Sequential(_Centred(), *layers, nn.Flatten(), nn.Linear(channels * height * side, features), nn.SiLU())


class WordsDecoder(nn.Sequential):
    """Decoder of words. Its last two layers are the output layer of each position and the split into positions."""

    def log_likelihood(self, z: Float[Tensor, "batch latent"], tokens: Int[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
        """Return log p(tokens | z) of each row in nats, as ``likelihood.log_likelihood`` of the decoder's output."""
        *hidden_layers, output, _ = self
        assert isinstance(output, nn.Linear)
        for layer in hidden_layers:
            z = layer(z)
        observed = tokens.clamp(0, output.out_features - 1).flatten()  # filler of absent rows may be out of range
        return token_log_likelihood(z, output.weight, output.bias, observed).view(tokens.shape).sum(1)


class ImageDecoder(nn.Module):
    """Decoder of an image or a spectrogram: a coarse grid, whose resolution doubles until it is that of the image.

    Residual blocks come before each doubling. Then only blocks and the last layer have activations, each after group
    normalisation (identity mappings, He et al. 2016). Without it, the first steps on photographs with a white background drove
    the grid into the flat part of the activations, and the decoder ignored z from then on. All information passes z: nothing of
    an encoder reaches the decoder.
    """

    def __init__(self, modality: ImageModality | AudioModality, sizes: NetworkSizes) -> None:
        super().__init__()
        width = sizes.width
        levels = _halvings(modality)
        channels, self.height, self.width = modality.shape
        coarse = (_channels(width, levels - 1), math.ceil(self.height / 2**levels), math.ceil(self.width / 2**levels))
        activation = () if sizes.blocks else (nn.SiLU(),)
        layers: list[nn.Module] = [
            nn.Linear(sizes.latent, sizes.hidden),
            nn.SiLU(),
            nn.Linear(sizes.hidden, math.prod(coarse)),
            *activation,
            nn.Unflatten(1, coarse),
        ]
        for level in reversed(range(levels)):
            before = _channels(width, level)
            layers += [ResidualBlock(before) for _ in range(sizes.blocks)]
            if level:
                after = _channels(width, level - 1)
                layers += [_Doubled(before, after) if sizes.blocks else nn.ConvTranspose2d(before, after, 4, 2, 1), *activation]
        if sizes.blocks:
            pixels = coarse[1] * coarse[2] * 4 ** (levels - 1)
            layers += [_GroupNorm(width) if pixels >= MIN_NORMALISED else nn.Identity(), nn.SiLU()]
        self.layers = nn.Sequential(*layers, _ToPixels(width, raw_channels(modality)))
        # The grid doubles in each layer. Pixels beyond the image's size are cropped evenly from both sides.
        self.top = (coarse[1] * 2**levels - self.height) // 2
        self.left = (coarse[2] * 2**levels - self.width) // 2
        self.scale: nn.Parameter | None = None
        if modality.learned_scale != "none":
            scales = channels if modality.learned_scale == "channel" else 1
            initial = math.log(max(modality.scale - MIN_SCALE, MIN_SCALE)) / SCALE_GAIN
            self.scale = nn.Parameter(torch.full((scales, 1, 1), initial))

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channel height width"]:
        grid = self.layers(z)
        cropped: Tensor = grid[:, :, self.top : self.top + self.height, self.left : self.left + self.width]
        return cropped

    @property
    def log_scale(self) -> Float[Tensor, "channel 1 1"] | None:
        """Logarithm of the learned scale, one for all channels or one for each. None: it is not learned."""
        return None if self.scale is None else torch.log(torch.exp(SCALE_GAIN * self.scale) + MIN_SCALE)


class ResidualBlock(nn.Module):
    """x + f(x), where f is two convolutions, each after group normalisation and SiLU (He et al. 2016). Size and channels stay.

    It starts as the identity: ``initialise`` sets the second convolution to zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = _GroupNorm(channels), _GroupNorm(channels)
        self.inner = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.outer = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        hidden = self.inner(nn.functional.silu(self.first_norm(x)))
        change: Tensor = self.outer(nn.functional.silu(self.second_norm(hidden)))
        return x + change


class _Doubled(nn.Conv2d):
    """A convolution after each pixel has become 2 x 2 equal ones.

    With residual blocks it had a lower error after 150 steps on photographs of birds than a transposed convolution or a pixel
    shuffle, which start with patterns of a period of two pixels (Odena et al. 2016).
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch output height2 width2"]:
        # Not nn.functional.interpolate, whose gradient cannot be exported.
        doubled = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)
        return super().forward(doubled)


class _ToPixels(nn.ConvTranspose2d):
    """The last layer of an image decoder. Except during export it is computed as a convolution at the lower resolution.

    With stride 2, kernel 4 and padding 1 each output pixel depends on 2 x 2 of the 3 x 3 input pixels around it. So one
    convolution with four times the output channels computes four pixels at once (Shi et al. 2016). PyTorch's transposed
    convolution is several times slower for this few output channels.
    """

    _TAPS: Final = ((3, 1, 4), (4, 2, 0))
    """Row of the kernel for each row of the 3 x 3 input, for even and for odd output rows. 4: a row of zeros."""

    taps: Tensor

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, kernel_size=4, stride=2, padding=1)
        self.register_buffer("taps", torch.tensor(self._TAPS), persistent=False)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch pixel height2 width2"]:  # type: ignore[override]  # no output size
        if is_tracing(x) or not len(x) or self.out_channels > self.in_channels // 2:  # pixel_shuffle needs a row
            return super().forward(x)
        padded = nn.functional.pad(self.weight, (0, 1, 0, 1))
        kernels = padded[:, :, self.taps.view(2, 3, 1, 1), self.taps]  # (in, out, row phase, row, column phase, column)
        weight = kernels.permute(1, 2, 4, 0, 3, 5).flatten(0, 2)
        bias = None if self.bias is None else self.bias.repeat_interleave(4)
        return nn.functional.pixel_shuffle(nn.functional.conv2d(x, weight, bias, padding=1), 2)


class _GroupNorm(nn.GroupNorm):
    """Group normalisation. For export it uses other operations, because the exporter's version fails on an empty batch."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(GROUPS, channels), channels)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        if not is_tracing(x):
            # Without the check of nn.functional.group_norm: a batch may have a single row with a picture of a few pixels.
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        group = math.prod(x.shape[1:]) // self.num_groups
        normal = nn.functional.layer_norm(x.reshape(x.shape[0], self.num_groups, group), (group,), eps=self.eps)
        return normal.reshape(x.shape) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class _Centred(nn.Module):
    """Pixels from [0, 1] to [-2, 2]: mean near 0 and standard deviation near 1, as ``initialise`` assumes for inputs."""

    def forward(self, pixels: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        return 4 * pixels - 2


class _OneHot(nn.Module):
    """Ids to flattened one-hot vectors. An id out of range becomes zeros."""

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.categories = categories

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch values"]:
        categories = torch.arange(self.categories, device=tokens.device)
        return (tokens.unsqueeze(-1) == categories).to(torch.float32).flatten(1)


class _WordsEncoder(nn.Module):
    """Convolution over each word and the words next to it, then a sum over positions, so absolute positions do not matter."""

    def __init__(self, modality: TextModality, features: int) -> None:
        super().__init__()
        self.words = nn.Embedding(modality.categories, WORD_FEATURES)
        self.context = nn.Conv1d(WORD_FEATURES, features, kernel_size=3, padding=1)
        self.out = nn.Linear(features, features)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch feature"]:
        written = (tokens != 0).unsqueeze(-1)
        # Filler of absent rows may be out of range, and the embedding lookup must not fail.
        words = self.words(tokens.clamp(0, self.words.num_embeddings - 1)) * written
        contexts = nn.functional.silu(self.context(words.transpose(1, 2)).transpose(1, 2)) * written
        pooled = contexts.sum(1) / written.sum(1).clamp(min=1).sqrt()  # the same scale for any number of words
        return nn.functional.silu(self.out(pooled))
