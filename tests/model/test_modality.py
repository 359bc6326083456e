"""Modalities: validation of descriptions and arrays, likelihood weights, batching."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from concord.model.modality import (
    PIXEL_STD,
    RESERVED_NAMES,
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
    check_array,
    collate,
    information,
    missing_statistics,
    propose_name,
    resolve_weights,
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
def test_modality_json_round_trip_is_equal(modality: Modality) -> None:
    adapter: TypeAdapter[Modality] = TypeAdapter(Modality)
    assert adapter.validate_json(adapter.dump_json(modality)) == modality


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "image", "name": "id", "channels": 1, "height": 2, "width": 2}, "reserved word.*for example 'image_id'"),
        ({"kind": "image", "name": "Photo", "channels": 1, "height": 2, "width": 2}, "choose another one, for example 'photo'"),
        ({"kind": "image", "name": "写真", "channels": 1, "height": 2, "width": 2}, "for example 'image'"),
        ({"kind": "image", "name": "a" * 65, "channels": 1, "height": 2, "width": 2}, f"for example '{'a' * 48}'"),
        ({"kind": "image", "name": "photo", "channels": 0, "height": 2, "width": 2}, "greater than or equal to 1"),
        ({"kind": "image", "name": "photo", "channels": 3, "height": 1, "width": 2}, "greater than or equal to 2"),
        ({"kind": "image", "name": "photo", "channels": 1, "height": 2, "width": 2, "depth": 1}, "Extra inputs"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "aba"}, "names a character twice"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "a"}, "at least one other"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "\ufffda"}, "must not come first"),
        ({"kind": "text", "name": "word", "length": 2, "alphabet": "ab", "unit": "word"}, "a vocabulary with unit"),
        ({"kind": "text", "name": "word", "length": 2, "vocabulary": ["a"]}, "a vocabulary with unit"),
        ({"kind": "text", "name": "word", "length": 2, "unit": "word", "vocabulary": ["a", "a"]}, "a word twice"),
        ({"kind": "categorical", "name": "brand", "classes": ["a", "a"]}, "a class is named twice"),
        ({"kind": "categorical", "name": "brand", "classes": ["a"]}, "name two or more"),
        ({"kind": "vector", "name": "x", "size": 2, "mean": [0.0]}, "mean has 1 numbers, the vector has 2"),
        ({"kind": "vector", "name": "x", "size": 1, "std": [0.0]}, "greater than 0"),
        ({"kind": "binary", "name": "x", "attributes": ["a", "a"]}, "named twice"),
        ({"kind": "sound", "name": "x"}, "kind must be image, audio, text, vector, binary or categorical"),
        ({"name": "x"}, "kind must be image"),
        ({"kind": "vector", "name": "x", "size": 2, "encoder": "e"}, "'image' or 'text'"),
        ({"kind": "image", "name": "x", "channels": 3, "encoder": "e"}, "Extra inputs"),
    ],
)
def test_modality_invalid_fields_raise(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Modality).validate_python(fields)


@given(title=st.text(max_size=80) | st.sampled_from(sorted(RESERVED_NAMES)), kind=st.sampled_from(["image", "text", "vector"]))
def test_propose_name_of_any_title_is_valid(title: str, kind: str) -> None:
    name = propose_name(title, kind)
    assert VectorModality(name=name, size=1).name == name


@pytest.mark.parametrize(
    ("title", "name"),
    [("Photo 1", "photo_1"), ("Größe", "grosse"), ("Año", "ano"), ("7", "image_7"), ("id", "image_id"), ("写真", "image")],
)
def test_propose_name_resembles_the_title(title: str, name: str) -> None:
    assert propose_name(title, "image") == name


@pytest.mark.parametrize("modality", ROWS, ids=lambda m: m.name)
def test_check_array_valid_row_passes(modality: Modality) -> None:
    check_array(modality, ROWS[modality])


@pytest.mark.parametrize("modality", ROWS, ids=lambda m: m.name)
def test_check_array_wrong_shape_or_dtype_raises(modality: Modality) -> None:
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
def test_check_array_value_out_of_range_raises(modality: Modality, value: float) -> None:
    row = ROWS[modality].copy()
    row.flat[-1] = value
    with pytest.raises(ValueError, match="values must be"):
        check_array(modality, row)


def test_resolve_weights_default_balances_array_sizes() -> None:
    weighted = WORD.model_copy(update={"weight": 10.0})
    assert resolve_weights([DIGIT, PHOTO, WORD]) == {"digit": 3072 / 784, "photo": 1.0, "word": 384.0}
    assert resolve_weights([PHOTO, weighted]) == {"photo": 1.0, "word": 10.0}


def test_resolve_weights_words_and_classes_use_log_of_categories() -> None:
    weights = resolve_weights([PHOTO, TITLE, BRAND])
    assert weights == {"photo": 1.0, "title": 3072 / (4 * np.log(4)), "brand": 3072 / np.log(3)}


def test_resolve_weights_by_information_lie_half_way_between_equal_weights_and_equal_shares() -> None:
    modalities = [PHOTO, BRAND, VectorModality(name="year", size=1)]
    nats = {"photo": 3072 * np.sqrt(2 / np.pi) * 0.25 / 0.75, "brand": np.log(3), "year": 0.5}
    assert {m.name: information(m) for m in modalities} == pytest.approx(nats)
    weights = resolve_weights(modalities, "information")
    assert weights == pytest.approx({name: (nats["photo"] / value) ** 0.5 for name, value in nats.items()})
    assert weights["year"] * nats["year"] < 0.05 * nats["photo"], "one number counts for less than all pixels"
    configured = PHOTO.model_copy(update={"weight": 2.0})
    assert resolve_weights([configured, BRAND], "information")["photo"] == 2.0


def test_information_is_what_the_best_prediction_gains_over_a_constant_one() -> None:
    """Against simulated values of the assumed distribution."""
    x = np.random.default_rng(0).normal(size=200_000)
    vector = VectorModality(name="numbers", size=1, scale=0.5)
    assert information(vector) == pytest.approx(0.5 * np.mean((x / 0.5) ** 2), rel=0.02)
    laplace = vector.model_copy(update={"likelihood": "laplace"})
    assert information(laplace) == pytest.approx(np.mean(np.abs(x) / 0.5), rel=0.02)
    grey = ImageModality(name="grey", channels=1, height=2, width=2, likelihood="bernoulli")
    pixels = np.clip(0.5 + PIXEL_STD * x, 0.001, 0.999)
    gain = np.mean(pixels * np.log(2 * pixels) + (1 - pixels) * np.log(2 * (1 - pixels)))
    assert information(grey) == pytest.approx(4 * gain, rel=0.2)
    assert information(BinaryModality(name="parts", attributes=("a", "b"))) == pytest.approx(2 * np.log(2))
    assert information(TITLE) == pytest.approx(4 * np.log(4))


def test_missing_statistics_names_the_empty_field() -> None:
    assert missing_statistics(TextModality(name="word", length=2)) == "alphabet"
    assert missing_statistics(TextModality(name="word", length=2, unit="word")) == "vocabulary"
    assert missing_statistics(CategoricalModality(name="brand")) == "classes"
    assert [missing_statistics(modality) for modality in ROWS] == [None] * len(ROWS)


def test_modality_dump_omits_unused_fields_of_format_2() -> None:
    assert set(WORD.model_dump()) == {"name", "weight", "kind", "length", "alphabet", "lowercase", "likelihood"}


def test_collate_absent_modalities_are_masked_and_zero() -> None:
    rows = [{"digit": ROWS[DIGIT]}, {"word": ROWS[WORD]}, {"digit": ROWS[DIGIT], "word": ROWS[WORD]}]
    inputs, present = collate([DIGIT, WORD], rows)
    assert present.tolist() == [[True, False], [False, True], [True, True]]
    assert inputs["digit"].shape == (3, 1, 28, 28)
    assert inputs["word"].dtype == np.int64
    for index, row in enumerate(rows):
        for modality in (DIGIT, WORD):
            expected = row.get(modality.name, np.zeros(modality.shape))
            np.testing.assert_array_equal(inputs[modality.name][index], expected)


def test_collate_no_rows_keeps_shapes() -> None:
    inputs, present = collate([DIGIT, WORD], [])
    assert present.shape == (0, 2)
    assert inputs["digit"].shape == (0, 1, 28, 28)
