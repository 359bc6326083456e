"""What describes a modality, and what a row of it may hold."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from model.modality import (
    BinaryModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    check_array,
    collate,
    resolve_weights,
)

DIGIT = ImageModality(name="digit", channels=1, height=28, width=28)
PHOTO = ImageModality(name="photo", channels=3, height=32, width=32)
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
SENSOR = VectorModality(name="sensor", size=3, mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 4.0))
TRAITS = BinaryModality(name="traits", attributes=("red", "round"))

ROWS = {
    DIGIT: np.full((1, 28, 28), 0.5, dtype=np.float32),
    WORD: np.arange(8, dtype=np.int64),
    SENSOR: np.array([1, -2, 1e30], dtype=np.float32),
    TRAITS: np.array([0, 1], dtype=np.float32),
}


@pytest.mark.parametrize("modality", [DIGIT, WORD, SENSOR, TRAITS], ids=lambda m: m.name)
def test_a_description_survives_json(modality: Modality) -> None:
    adapter: TypeAdapter[Modality] = TypeAdapter(Modality)
    assert adapter.validate_json(adapter.dump_json(modality)) == modality


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "image", "name": "id", "channels": 1, "height": 2, "width": 2}, "reserved word"),
        ({"kind": "image", "name": "Photo", "channels": 1, "height": 2, "width": 2}, "pattern"),
        ({"kind": "image", "name": "photo", "channels": 4, "height": 2, "width": 2}, "1 or 3"),
        ({"kind": "image", "name": "photo", "channels": 1, "height": 2, "width": 2, "depth": 1}, "Extra inputs"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "aba"}, "names a character twice"),
        ({"kind": "vector", "name": "x", "size": 2, "mean": [0.0]}, "mean has 1 numbers, the vector has 2"),
        ({"kind": "vector", "name": "x", "size": 1, "std": [0.0]}, "greater than 0"),
        ({"kind": "binary", "name": "x", "attributes": ["a", "a"]}, "named twice"),
        ({"kind": "sound", "name": "x"}, "kind"),
    ],
)
def test_a_wrong_description_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Modality).validate_python(fields)


@pytest.mark.parametrize("modality", ROWS, ids=lambda m: m.name)
def test_a_row_is_accepted(modality: Modality) -> None:
    check_array(modality, ROWS[modality])


@pytest.mark.parametrize("modality", ROWS, ids=lambda m: m.name)
def test_another_shape_or_dtype_is_refused(modality: Modality) -> None:
    row = ROWS[modality]
    with pytest.raises(ValueError, match="received shape"):
        check_array(modality, row[np.newaxis])
    with pytest.raises(ValueError, match="received shape"):
        check_array(modality, row.astype(np.float64))


@pytest.mark.parametrize(
    ("modality", "value"),
    [
        (DIGIT, 1.01),
        (DIGIT, -0.01),
        (DIGIT, np.nan),
        (WORD, 27),
        (WORD, -1),
        (SENSOR, np.nan),
        (SENSOR, np.inf),
        (TRAITS, 0.5),
        (TRAITS, np.nan),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_a_value_out_of_range_is_refused(modality: Modality, value: float) -> None:
    row = ROWS[modality].copy()
    row.flat[-1] = value
    with pytest.raises(ValueError, match="values must be"):
        check_array(modality, row)


def test_weights_balance_array_sizes_unless_given() -> None:
    given = WORD.model_copy(update={"weight": 10.0})
    assert resolve_weights([DIGIT, PHOTO, WORD]) == {"digit": 3072 / 784, "photo": 1.0, "word": 384.0}
    assert resolve_weights([PHOTO, given]) == {"photo": 1.0, "word": 10.0}


def test_collate_marks_absent_modalities_and_zeroes_them() -> None:
    rows = [{"digit": ROWS[DIGIT]}, {"word": ROWS[WORD]}, {"digit": ROWS[DIGIT], "word": ROWS[WORD]}]
    inputs, present = collate([DIGIT, WORD], rows)
    assert present.tolist() == [[True, False], [False, True], [True, True]]
    assert inputs["digit"].shape == (3, 1, 28, 28)
    assert inputs["word"].dtype == np.int64
    for index, row in enumerate(rows):
        for modality in (DIGIT, WORD):
            expected = row.get(modality.name, np.zeros(modality.shape))
            np.testing.assert_array_equal(inputs[modality.name][index], expected)


def test_collate_of_no_rows_keeps_the_shapes() -> None:
    inputs, present = collate([DIGIT, WORD], [])
    assert present.shape == (0, 2)
    assert inputs["digit"].shape == (0, 1, 28, 28)
