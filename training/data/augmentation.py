"""Augmentation: flips and translations of training images, translations in time and contrast of training spectrograms."""

import numpy as np
from jaxtyping import Float32, Int64, Shaped


def sample_variations(
    rows: int, generator: np.random.Generator, *, flip: bool, shift: int, vertical: bool = True
) -> Int64[np.ndarray, "row 3"]:
    """Sample a flip and a translation for each row.

    Args:
        flip: flip rows with probability 0.5. False: never.
        shift: largest translation in each direction, in pixels.
        vertical: whether rows are translated up and down too.

    Returns:
        (rows, 3): flip (0 or 1), shift down and shift right in pixels.
    """
    flipped = generator.integers(0, 2 if flip else 1, (rows, 1))
    variations = np.concatenate([flipped, generator.integers(-shift, shift + 1, (rows, 2))], axis=1)
    variations[:, 1] *= vertical
    return variations


def augment(
    images: Shaped[np.ndarray, "row channel height width"], variations: Int64[np.ndarray, "row 3"]
) -> Shaped[np.ndarray, "row channel height width"]:
    """Flip each image, then translate it. Uncovered pixels repeat the nearest edge.

    Args:
        variations: see ``sample_variations``.
    """
    rows, channels, height, width = (np.arange(size) for size in images.shape)
    flipped, down, right = (part[:, np.newaxis] for part in variations.T)
    y = np.clip(height - down, 0, len(height) - 1)
    x = np.clip(width - right, 0, len(width) - 1)
    x = np.where(flipped == 1, len(width) - 1 - x, x)
    index = (rows[:, None, None, None], channels[:, None, None], y[:, None, :, None], x[:, None, None, :])
    return np.asarray(images[index])


def sample_contrasts(rows: int, generator: np.random.Generator, strength: float) -> Float32[np.ndarray, " row"]:
    """Sample a factor for each row, log-uniform from exp(-strength) to exp(strength)."""
    return np.exp(generator.uniform(-strength, strength, rows)).astype(np.float32)


def change_contrast(
    spectrograms: Float32[np.ndarray, "row channel mel frame"], factors: Float32[np.ndarray, " row"]
) -> Float32[np.ndarray, "row channel mel frame"]:
    """Multiply the decibels between each value and the loudest possible one, 1, by the factor of its row.

    This is the power law of loudness (a gamma correction of the spectrum): a large factor hides background noise, as a better
    microphone does. Values at the floor stay there, so that the padding around a short clip remains silent.

    Args:
        spectrograms: in [0, 1], see ``model.codec.audio``.
    """
    changed = np.maximum(0, 1 - (1 - spectrograms) * factors[:, None, None, None])
    return np.where(spectrograms > 0, changed, np.float32(0))
