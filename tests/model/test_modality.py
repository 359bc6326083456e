"""What describes a modality, and what a row of it may hold."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from model.modality import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    check_array,
    collate,
    resolve_weights,
    unlearned,
)

DIGIT = ImageModality(name="digit", channels=1, height=28, width=28)
PHOTO = ImageModality(name="photo", channels=3, height=32, width=32)
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
SENSOR = VectorModality(name="sensor", size=3, mean=(0.0, 1.0, 2.0), std=(1.0, 2.0, 4.0))
TRAITS = BinaryModality(name="traits", attributes=("red", "round"))
TITLE = TextModality(name="title", length=4, unit="word", vocabulary=("blue", "cup"))
BRAND = CategoricalModality(name="brand", classes=("acme", "zenith", "none"))
SCAN = ImageModality(name="scan", channels=5, height=2, width=3)

ROWS = {
    DIGIT: np.full((1, 28, 28), 0.5, dtype=np.float32),
    WORD: np.arange(8, dtype=np.int64),
    SENSOR: np.array([1, -2, 1e30], dtype=np.float32),
    TRAITS: np.array([0, 1], dtype=np.float32),
    TITLE: np.array([3, 1, 2, 0]),
    BRAND: np.array([2]),
    SCAN: np.full((5, 2, 3), 0.5, dtype=np.float32),
}


@pytest.mark.parametrize("modality", list(ROWS), ids=lambda m: m.name)
def test_a_description_survives_json(modality: Modality) -> None:
    adapter: TypeAdapter[Modality] = TypeAdapter(Modality)
    assert adapter.validate_json(adapter.dump_json(modality)) == modality


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "image", "name": "id", "channels": 1, "height": 2, "width": 2}, "reserved word"),
        ({"kind": "image", "name": "Photo", "channels": 1, "height": 2, "width": 2}, "pattern"),
        ({"kind": "image", "name": "photo", "channels": 0, "height": 2, "width": 2}, "greater than or equal to 1"),
        ({"kind": "image", "name": "photo", "channels": 3, "height": 1, "width": 2}, "greater than or equal to 2"),
        ({"kind": "image", "name": "photo", "channels": 1, "height": 2, "width": 2, "depth": 1}, "Extra inputs"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "aba"}, "names a character twice"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "a"}, "at least one other"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "\ufffda"}, "not first"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "ab", "unit": "word"}, "a vocabulary with unit"),
        ({"kind": "text", "name": "word", "length": 2, "vocabulary": ["a"]}, "a vocabulary with unit"),
        ({"kind": "text", "name": "word", "length": 2, "unit": "word", "vocabulary": ["a", "a"]}, "a word twice"),
        ({"kind": "categorical", "name": "brand", "classes": ["a", "a"]}, "a class is named twice"),
        ({"kind": "categorical", "name": "brand", "classes": ["a"]}, "name two or more"),
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
        (TITLE, 4),
        (BRAND, 3),
        (BRAND, -1),
        (SCAN, 1.01),
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


def test_a_word_and_a_class_weigh_by_how_many_there_are() -> None:
    weights = resolve_weights([PHOTO, TITLE, BRAND])
    assert weights == {"photo": 1.0, "title": 3072 / (4 * np.log(4)), "brand": 3072 / np.log(3)}


def test_what_is_to_be_learned_is_named() -> None:
    assert unlearned(TextModality(name="word", length=2)) == "alphabet"
    assert unlearned(TextModality(name="word", length=2, unit="word")) == "vocabulary"
    assert unlearned(CategoricalModality(name="brand")) == "classes"
    assert [unlearned(modality) for modality in ROWS] == [None] * len(ROWS)


def test_what_the_first_format_lacks_is_told_only_where_it_is_used() -> None:
    assert set(WORD.model_dump()) == {"name", "weight", "kind", "length", "alphabet", "lowercase", "likelihood"}


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
