"""Encoder trunks (x_m -> features) and decoders (z -> raw output) of each kind of modality."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.modality import CategoricalModality, ImageModality, Modality, TextModality

SILU_GAIN = 1.7  # standard normal in, standard normal out: 1 / sqrt(E[SiLU(x)^2]), rounded
COARSEST = 4  # pixels: the side at which convolutions stop halving
DOUBLINGS = 3  # of a convolution's channels; pictures above 90 pixels a side would make networks of gigabytes otherwise
GROUPS = 8  # of channels that an image encoder normalises together, row by row (Wu & He 2018)
WORD_FEATURES = 64  # of each word, on the way in and on the way out


def encoder(modality: Modality, features: int, width: int) -> nn.Module:
    """Network from (batch, *shape) to (batch, features).

    Args:
        features: size of the output.
        width: channels of the first convolution; doubled at every halving of the picture, ``DOUBLINGS`` times at most.
    """
    if isinstance(modality, ImageModality):
        return _image_encoder(modality, features, width)
    if isinstance(modality, TextModality) and modality.unit == "word":
        return _WordsEncoder(modality, features)
    if isinstance(modality, TextModality | CategoricalModality):
        values = math.prod(modality.shape) * modality.categories
        return nn.Sequential(_OneHot(modality.categories), *_perceptron(values, features), nn.SiLU())
    return nn.Sequential(*_perceptron(math.prod(modality.shape), features), nn.SiLU())


def decoder(modality: Modality, latent: int, hidden: int, width: int) -> nn.Module:
    """Network from z (batch, latent) to the raw output: (batch, *shape), for text and classes (batch, *shape, category).

    Args:
        hidden: size of the hidden layers.
        width: channels before the last convolution; doubled at every halving of the picture, ``DOUBLINGS`` times at most.
    """
    if isinstance(modality, ImageModality):
        return _ImageDecoder(modality, latent, hidden, width)
    shape = modality.shape
    if isinstance(modality, TextModality) and modality.unit == "word":
        return nn.Sequential(
            nn.Linear(latent, hidden),
            nn.SiLU(),
            *_perceptron(hidden, modality.length * WORD_FEATURES, hidden),
            nn.SiLU(),
            nn.Unflatten(1, (modality.length, WORD_FEATURES)),
            nn.Flatten(0, 1),  # the same choice of words at every place
            nn.Linear(WORD_FEATURES, modality.categories),
            nn.Unflatten(0, (-1, modality.length)),
        )
    if isinstance(modality, TextModality | CategoricalModality):
        shape = (*shape, modality.categories)
    return nn.Sequential(
        nn.Linear(latent, hidden), nn.SiLU(), *_perceptron(hidden, math.prod(shape), hidden), nn.Unflatten(1, shape)
    )


def initialise(network: nn.Module, last: float = 1.0) -> None:
    """Draw weights that keep the scale of signals from layer to layer; that of the last layer's output is ``last``.

    PyTorch's default shrinks them by a half or more in each layer with a SiLU behind it. A decoder that begins so quiet learns
    to ignore z before z says anything, and the whole model stays there.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    for layer in layers:
        # A transposed convolution of kernel 4 and stride 2 brings 2 x 2 places together in each output.
        inputs = layer.in_channels * 4 if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
        gain = last if layer is layers[-1] else SILU_GAIN
        nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _perceptron(inputs: int, outputs: int, hidden: int = 0) -> tuple[nn.Module, ...]:
    hidden = hidden or outputs
    return nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs)


def _halvings(modality: ImageModality) -> int:
    return max(1, round(math.log2(min(modality.height, modality.width) / COARSEST)))


def _channels(width: int, level: int) -> int:
    return width << min(level, DOUBLINGS)


def _image_encoder(modality: ImageModality, features: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels: int = modality.channels
    height, side = modality.height, modality.width
    for level in range(_halvings(modality)):
        after = _channels(width, level)
        norm = _GroupNorm(math.gcd(GROUPS, after), after)
        layers += [nn.Conv2d(channels, after, kernel_size=4, stride=2, padding=1), norm, nn.SiLU()]
        channels, height, side = after, height // 2, side // 2
    return nn.Sequential(_Centred(), *layers, nn.Flatten(), nn.Linear(channels * height * side, features), nn.SiLU())


class _ImageDecoder(nn.Module):
    def __init__(self, modality: ImageModality, latent: int, hidden: int, width: int) -> None:
        super().__init__()
        levels = _halvings(modality)
        coarse = (_channels(width, levels - 1), math.ceil(modality.height / 2**levels), math.ceil(modality.width / 2**levels))
        layers: list[nn.Module] = [
            nn.Linear(latent, hidden),
            nn.SiLU(),
            nn.Linear(hidden, math.prod(coarse)),
            nn.SiLU(),
            nn.Unflatten(1, coarse),
        ]
        for level in reversed(range(1, levels)):
            before, after = _channels(width, level), _channels(width, level - 1)
            layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, modality.channels, kernel_size=4, stride=2, padding=1))
        # The grid grows by doubling; what exceeds the picture is cut evenly from both sides.
        self.top = (coarse[1] * 2**levels - modality.height) // 2
        self.left = (coarse[2] * 2**levels - modality.width) // 2
        self.height, self.width = modality.height, modality.width

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channel height width"]:
        grown = self.layers(z)
        cut: Tensor = grown[:, :, self.top : self.top + self.height, self.left : self.left + self.width]
        return cut


class _GroupNorm(nn.GroupNorm):
    """Spelled out where a graph is recorded: as the exporter spells it, it cannot take a batch of no rows."""

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        group = math.prod(x.shape[1:]) // self.num_groups
        normal = nn.functional.layer_norm(x.reshape(x.shape[0], self.num_groups, group), (group,), eps=self.eps)
        return normal.reshape(x.shape) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class _Centred(nn.Module):
    """Pixels from [0, 1] to [-2, 2]: mean near 0 and deviation near 1, as ``initialise`` expects of an input."""

    def forward(self, pixels: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        return 4 * pixels - 2


class _OneHot(nn.Module):
    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch values"]:
        known = torch.arange(self.alphabet, device=tokens.device)
        return (tokens.unsqueeze(-1) == known).to(torch.float32).flatten(1)


class _WordsEncoder(nn.Module):
    """Each word with its neighbours, wherever it stands; then all of them together."""

    def __init__(self, modality: TextModality, features: int) -> None:
        super().__init__()
        self.words = nn.Embedding(modality.categories, WORD_FEATURES)
        self.context = nn.Conv1d(WORD_FEATURES, features, kernel_size=3, padding=1)
        self.out = nn.Linear(features, features)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch feature"]:
        written = (tokens != 0).unsqueeze(-1)
        # What fills an absent slot may be no token at all, and must not stop the lookup.
        words = self.words(tokens.clamp(0, self.words.num_embeddings - 1)) * written
        seen = nn.functional.silu(self.context(words.transpose(1, 2)).transpose(1, 2)) * written
        together = seen.sum(1) / written.sum(1).clamp(min=1).sqrt()  # of the scale of one word, however many there are
        return nn.functional.silu(self.out(together))
