"""Training pictures varied: mirrored and moved, so that few of them teach more."""

import numpy as np
from jaxtyping import Int64, Shaped


def draw_variations(rows: int, generator: np.random.Generator, *, flip: bool, shift: int) -> Int64[np.ndarray, "row 3"]:
    """Of each row: whether it is mirrored (0 or 1, equally likely), and by how many pixels it moves down and to the right.

    Args:
        flip: whether rows are mirrored at all.
        shift: most pixels in each direction.
    """
    mirrored = generator.integers(0, 2 if flip else 1, (rows, 1))
    return np.concatenate([mirrored, generator.integers(-shift, shift + 1, (rows, 2))], axis=1)


def varied(
    pictures: Shaped[np.ndarray, "row channel height width"], variations: Int64[np.ndarray, "row 3"]
) -> Shaped[np.ndarray, "row channel height width"]:
    """The pictures mirrored and then moved as told, their edges repeated where that uncovers something."""
    rows, channels, height, width = (np.arange(size) for size in pictures.shape)
    mirrored, down, right = (part[:, np.newaxis] for part in variations.T)
    y = np.clip(height - down, 0, len(height) - 1)
    x = np.clip(width - right, 0, len(width) - 1)
    x = np.where(mirrored == 1, len(width) - 1 - x, x)
    place = (rows[:, None, None, None], channels[:, None, None], y[:, None, :, None], x[:, None, None, :])
    return np.asarray(pictures[place])
