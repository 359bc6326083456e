"""Encoder trunks (x_m -> features) and decoders (z -> raw output) of each kind of modality."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.modality import ImageModality, Modality, TextModality

SILU_GAIN = 1.7  # standard normal in, standard normal out: 1 / sqrt(E[SiLU(x)^2]), rounded
COARSEST = 4  # pixels: the side at which convolutions stop halving


def encoder(modality: Modality, features: int, width: int) -> nn.Module:
    """Network from (batch, *shape) to (batch, features).

    Args:
        features: size of the output.
        width: channels of the first convolution; doubled at every halving of the picture.
    """
    if isinstance(modality, ImageModality):
        return _image_encoder(modality, features, width)
    if isinstance(modality, TextModality):
        return nn.Sequential(
            _OneHot(len(modality.alphabet)), *_perceptron(modality.length * len(modality.alphabet), features), nn.SiLU()
        )
    return nn.Sequential(*_perceptron(math.prod(modality.shape), features), nn.SiLU())


def decoder(modality: Modality, latent: int, hidden: int, width: int) -> nn.Module:
    """Network from z (batch, latent) to the raw output: (batch, *shape), for text (batch, length, alphabet).

    Args:
        hidden: size of the hidden layers.
        width: channels before the last convolution; doubled at every halving of the picture.
    """
    if isinstance(modality, ImageModality):
        return _ImageDecoder(modality, latent, hidden, width)
    if isinstance(modality, TextModality):
        shape: tuple[int, ...] = (modality.length, len(modality.alphabet))
    else:
        shape = modality.shape
    return nn.Sequential(
        nn.Linear(latent, hidden), nn.SiLU(), *_perceptron(hidden, math.prod(shape), hidden), nn.Unflatten(1, shape)
    )


def initialise(network: nn.Module, last: float = 1.0) -> None:
    """Draw weights that keep the scale of signals from layer to layer; that of the last layer's output is ``last``.

    PyTorch's default shrinks them by a half or more in each layer with a SiLU behind it. A decoder that begins so quiet learns
    to ignore z before z says anything, and the whole model stays there.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
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


def _image_encoder(modality: ImageModality, features: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels: int = modality.channels
    height, side = modality.height, modality.width
    for level in range(_halvings(modality)):
        layers += [nn.Conv2d(channels, width << level, kernel_size=4, stride=2, padding=1), nn.SiLU()]
        channels, height, side = width << level, height // 2, side // 2
    return nn.Sequential(_Centred(), *layers, nn.Flatten(), nn.Linear(channels * height * side, features), nn.SiLU())


class _ImageDecoder(nn.Module):
    def __init__(self, modality: ImageModality, latent: int, hidden: int, width: int) -> None:
        super().__init__()
        levels = _halvings(modality)
        coarse = (width << (levels - 1), math.ceil(modality.height / 2**levels), math.ceil(modality.width / 2**levels))
        layers: list[nn.Module] = [
            nn.Linear(latent, hidden),
            nn.SiLU(),
            nn.Linear(hidden, math.prod(coarse)),
            nn.SiLU(),
            nn.Unflatten(1, coarse),
        ]
        for level in reversed(range(1, levels)):
            layers += [nn.ConvTranspose2d(width << level, width << (level - 1), kernel_size=4, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, modality.channels, kernel_size=4, stride=2, padding=1))
        # The grid grows by doubling; what exceeds the picture is cut evenly from both sides.
        self.top = (coarse[1] * 2**levels - modality.height) // 2
        self.left = (coarse[2] * 2**levels - modality.width) // 2
        self.height, self.width = modality.height, modality.width

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channel height width"]:
        grown = self.layers(z)
        cut: Tensor = grown[:, :, self.top : self.top + self.height, self.left : self.left + self.width]
        return cut


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
