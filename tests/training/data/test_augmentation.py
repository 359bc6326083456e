"""Flipped and translated images, spectrograms of another contrast, checked value by value."""

import numpy as np

from concord.training.data.augmentation import augment, change_contrast, sample_contrasts, sample_variations

IMAGE = np.arange(12, dtype=np.uint8).reshape(1, 1, 3, 4)


def augmented(flip: int, down: int, right: int) -> list[list[int]]:
    images = augment(IMAGE, np.array([[flip, down, right]]))
    assert images.dtype == np.uint8
    return images[0, 0].tolist()


def test_augment_flips_then_translates_and_repeats_edges() -> None:
    assert augmented(0, 0, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert augmented(1, 0, 0) == [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]
    assert augmented(0, 1, 0) == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert augmented(0, 0, -2) == [[2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]
    assert augmented(1, 0, -2) == [[1, 0, 0, 0], [5, 4, 4, 4], [9, 8, 8, 8]]


def test_augment_batch_uses_each_rows_variation_for_all_channels() -> None:
    images = np.random.default_rng(0).random((5, 3, 6, 6), dtype=np.float32)
    variations = sample_variations(5, np.random.default_rng(1), flip=True, shift=2)
    batch = augment(images, variations)
    for row, channel in np.ndindex(5, 3):
        single = augment(images[row : row + 1, channel : channel + 1], variations[row : row + 1])
        assert np.array_equal(batch[row, channel], single[0, 0])


def test_sample_variations_cover_their_range() -> None:
    variations = sample_variations(2000, np.random.default_rng(0), flip=True, shift=2)
    assert [set(part) for part in variations.T.tolist()] == [{0, 1}, {-2, -1, 0, 1, 2}, {-2, -1, 0, 1, 2}]
    assert abs(variations[:, 0].mean() - 0.5) < 0.06
    only_sideways = sample_variations(50, np.random.default_rng(0), flip=False, shift=2, vertical=False)
    assert not only_sideways[:, :2].any()
    assert only_sideways[:, 2].any()
    assert not sample_variations(50, np.random.default_rng(0), flip=False, shift=0).any()


def test_contrast_multiplies_the_decibels_below_the_loudest_value_and_keeps_silence() -> None:
    spectrogram = np.array([[[[1.0, 0.75, 0.5, 0.25, 0.0]]]], np.float32)
    less = change_contrast(spectrogram, np.array([0.5], np.float32))
    assert less.dtype == np.float32
    assert less.ravel().tolist() == [1.0, 0.875, 0.75, 0.625, 0.0]
    more = change_contrast(np.repeat(spectrogram, 2, axis=0), np.array([1, 1.5], np.float32))
    assert more[0].ravel().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert more[1].ravel().tolist() == [1.0, 0.625, 0.25, 0.0, 0.0]


def test_sampled_contrasts_are_log_uniform() -> None:
    logarithms = np.log(sample_contrasts(5000, np.random.default_rng(0), 0.5))
    assert abs(logarithms).max() <= 0.5
    np.testing.assert_allclose(np.quantile(logarithms, [0.1, 0.5, 0.9]), [-0.4, 0.0, 0.4], atol=0.03)
