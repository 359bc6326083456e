"""Mirrored and moved pictures, pixel by pixel."""

import numpy as np

from training.augmentation import draw_variations, varied

PICTURE = np.arange(12, dtype=np.uint8).reshape(1, 1, 3, 4)


def one(mirrored: int, down: int, right: int) -> list[list[int]]:
    found = varied(PICTURE, np.array([[mirrored, down, right]]))
    assert found.dtype == np.uint8
    return found[0, 0].tolist()


def test_pictures_mirror_and_move() -> None:
    assert one(0, 0, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert one(1, 0, 0) == [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]
    assert one(0, 1, 0) == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert one(0, 0, -2) == [[2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]
    assert one(1, 0, -2) == [[1, 0, 0, 0], [5, 4, 4, 4], [9, 8, 8, 8]]


def test_each_row_and_all_its_channels_vary_as_the_row_is_told() -> None:
    pictures = np.random.default_rng(0).random((5, 3, 6, 6), dtype=np.float32)
    variations = draw_variations(5, np.random.default_rng(1), flip=True, shift=2)
    found = varied(pictures, variations)
    for row, channel in np.ndindex(5, 3):
        alone = varied(pictures[row : row + 1, channel : channel + 1], variations[row : row + 1])
        assert np.array_equal(found[row, channel], alone[0, 0])


def test_variations_fill_their_range() -> None:
    drawn = draw_variations(2000, np.random.default_rng(0), flip=True, shift=2)
    assert [set(part) for part in drawn.T.tolist()] == [{0, 1}, {-2, -1, 0, 1, 2}, {-2, -1, 0, 1, 2}]
    assert abs(drawn[:, 0].mean() - 0.5) < 0.06
    assert not draw_variations(50, np.random.default_rng(0), flip=False, shift=0).any()
