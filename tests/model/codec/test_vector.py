"""Standardised numbers: the limit counts standard deviations, so any unit is fine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.model import codec
from concord.model.modality import VectorModality

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(low=FINITE, high=FINITE)
def test_standardise_of_any_finite_numbers_is_finite(low: float, high: float) -> None:
    """The mean lies between the numbers, and the deviation is half of their distance."""
    std = high / 2 - low / 2
    modality = VectorModality(name="v", size=1, mean=(low / 2 + high / 2,), std=(abs(std) or 1.0,))
    standardised = codec.standardise(modality, np.array([[low], [high]]))
    assert codec.within_range(standardised).all()
    assert np.abs(standardised).max() <= 2
    assert codec.parse(modality, [low]).tolist() == standardised[0].tolist()


def test_standardise_of_many_rows_equals_parse_of_each() -> None:
    numbers = np.random.default_rng(0).normal(3e9, 1e8, (50, 3))
    modality = VectorModality(name="v", size=3, mean=(3e9, 2.9e9, 0.0), std=(1e8, 7.0, 3e9))
    rows = np.stack([codec.parse(modality, row) for row in numbers.tolist()])
    assert np.array_equal(codec.standardise(modality, numbers), rows)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e10])
def test_within_range_rejects_what_is_no_measurement(number: float) -> None:
    modality = VectorModality(name="v", size=1)
    assert not codec.within_range(codec.standardise(modality, np.array([number]))).any()
    with pytest.raises(codec.CodecError, match="not finite, or more than 1e\\+09 standard deviations"):
        codec.parse(modality, [number])
