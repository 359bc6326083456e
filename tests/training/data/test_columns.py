"""Column layouts of user files: multiple texts per row, one number per column, named classes, both splits in one file."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.training.config import Config, Data, Source
from concord.training.data import dataset
from concord.training.errors import DataError

TITLE = TextModality(name="title", length=4, unit="word")
CODE = TextModality(name="code", length=4)
BRAND = CategoricalModality(name="brand")
SIZE = VectorModality(name="size", size=2)
TRAITS = BinaryModality(name="traits", attributes=("new", "red"))
SCAN = ImageModality(name="scan", channels=2, height=2, width=2)
NUMBERS = VectorModality(name="numbers", size=1)


def load(
    folder: Path,
    table: dict[str, list[Any]],
    columns: dict[str, str | tuple[str, ...]],
    split: Any = "train",
    *modalities: Modality,
    source: dict[str, Any] | None = None,
    **settings: Any,
) -> dataset.Dataset:
    datasets.Dataset.from_dict(table).to_parquet(folder / "rows.parquet")
    known: dict[str, Modality] = {m.name: m for m in (TITLE, CODE, BRAND, SIZE, TRAITS, SCAN, NUMBERS, *modalities)}
    options = source or {"test": "rows.parquet"}
    data = Data(pairing="row", sources=(Source(train="rows.parquet", columns=columns, licence="CC0", **options),), **settings)
    return dataset.load(Config(name="user", modalities=tuple(known[name] for name in columns), data=data), split, folder)


def all_rows(rows: dataset.Dataset) -> dataset.Batch:
    return next(rows.batches(0, len(rows), 0, shuffle=False))


def test_preprocessing_is_fitted_to_training_rows_only(tmp_path: Path) -> None:
    table = {
        "title": ["Blue cup", "blue mug", "cup", "rare", "new words", "new words"],
        "code": ["ab", "ba", "a", "x", "cc", "cc"],
        "brand": ["acme", "zenith", None, "acme", "acme", "acme"],
        "part": ["train"] * 4 + ["test"] * 2,
    }
    columns: dict[str, str | tuple[str, ...]] = {"title": "title", "code": "code", "brand": "brand"}
    source = {"split": "part"}
    train, test = (load(tmp_path, table, columns, split, source=source) for split in ("train", "test"))
    title, code, brand = train.modalities
    assert isinstance(title, TextModality)
    assert isinstance(code, TextModality)
    assert isinstance(brand, CategoricalModality)
    assert title.vocabulary == ("blue", "cup")
    assert code.alphabet == " ab\ufffd"  # a character that occurs in one row only is unknown
    assert brand.classes == ("acme", "zenith")
    assert test.modalities == train.modalities
    assert (len(train), len(test)) == (4, 2)
    batch = all_rows(train)
    assert batch.arrays["title"].tolist() == [[2, 3, 0, 0], [2, 1, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.arrays["code"].tolist()[3] == [3, 0, 0, 0]
    assert batch.arrays["brand"].tolist() == [[0], [1], [0], [0]]
    assert batch.present.tolist() == [[True, True, True], [True, True, True], [True, True, False], [True, True, True]]
    assert all_rows(test).arrays["title"].tolist() == [[1, 1, 0, 0]] * 2


def test_vocabulary_above_max_keeps_most_frequent_words(tmp_path: Path) -> None:
    table = {"title": ["a b", "a b", "a c", "a c", "c"], "numbers": [[1.0]] * 5}
    rows = load(tmp_path, table, {"title": "title", "numbers": "numbers"}, max_vocabulary=2)
    title = rows.modalities[0]
    assert isinstance(title, TextModality)
    assert title.vocabulary == ("a", "c")


def test_multiple_texts_are_sampled_each_epoch(tmp_path: Path) -> None:
    table = {"title": [["a", "b", "c"], None, ["b", " "], []], "numbers": [[1.0], [2.0], [3.0], [4.0]]}
    title = TITLE.model_copy(update={"vocabulary": ("a", "b", "c")})
    rows = load(tmp_path, table, {"title": "title", "numbers": "numbers"}, "train", title)
    batch = all_rows(rows)
    assert batch.present[:, 0].tolist() == [True, False, True, False]
    assert batch.arrays["title"][:, 0].tolist() == [2, 0, 3, 0]  # without shuffle, the first text
    sampled = []
    for epoch in range(200):
        (batch,) = rows.batches(epoch, 4, 7)
        order = np.argsort(batch.arrays["numbers"][:, 0].numpy())
        sampled.append(batch.arrays["title"][order][:, 0].tolist())
    assert {tuple(words[1:]) for words in sampled} == {(0, 3, 0)}
    counts = np.bincount([words[0] for words in sampled], minlength=5)[2:5]
    assert counts.sum() == 200
    assert np.all(counts > 40)
    epoch_titles = [batch.arrays["title"].tolist() for batch in rows.batches(3, 2, 7)]
    assert [batch.arrays["title"].tolist() for batch in rows.batches(3, 2, 7, start=1)] == epoch_titles[1:]


def test_columns_of_single_numbers_form_vector_and_attributes(tmp_path: Path) -> None:
    table = {
        "width": [1.0, 3.0, None, float("nan")],
        "height": [2, 4, None, None],
        "new": [True, False, None, True],
        "red": [1, 0, None, 0],
    }
    size = SIZE.model_copy(update={"mean": (0.0, 0.0), "std": (1.0, 1.0)})
    columns: dict[str, str | tuple[str, ...]] = {"size": ("width", "height"), "traits": ("new", "red"), "numbers": "red"}
    batch = all_rows(load(tmp_path, table, columns, "train", size, bad_values="absent"))
    assert len(batch.present) == 3  # one row has no modality
    assert batch.present.tolist() == [[True] * 3, [True] * 3, [False, True, True]]
    assert batch.arrays["size"].tolist()[:2] == [[1, 2], [3, 4]]
    assert batch.arrays["traits"].tolist() == [[1, 1], [0, 0], [1, 0]]


def test_vector_with_null_component_is_rejected(tmp_path: Path) -> None:
    table = {"width": [1.0, 3.0], "height": [2.0, None], "brand": ["a", "b"]}
    columns: dict[str, str | tuple[str, ...]] = {"size": ("width", "height"), "brand": "brand"}
    with pytest.raises(DataError, match=r"row 1, column 'width', 'height': invalid size: height is null.*bad_values"):
        load(tmp_path, table, columns)


def test_image_of_two_channels_is_parsed_from_nested_lists(tmp_path: Path) -> None:
    image = [[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [1.0, 1.0]]]
    table = {"scan": [image, image, None], "brand": ["a", "b", "a"]}
    batch = all_rows(load(tmp_path, table, {"scan": "scan", "brand": "brand"}))
    assert batch.arrays["scan"].tolist() == [image, image, np.zeros((2, 2, 2)).tolist()]
    table["scan"][1] = image[:1]
    with pytest.raises(DataError, match=r"row 1, column 'scan': invalid scan: the shape must be \[2, 2, 2\]"):
        load(tmp_path, table, {"scan": "scan", "brand": "brand"})


def test_held_out_rows_are_the_same_for_each_load(tmp_path: Path) -> None:
    table = {"numbers": [[float(row)] for row in range(50)], "brand": ["a", "b"] * 25}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    numbers = NUMBERS.model_copy(update={"mean": (0.0,), "std": (1.0,)})
    source = {"held_out": 0.2}
    train, test, repeated = (
        all_rows(load(tmp_path, table, columns, split, numbers, source=source)).arrays["numbers"][:, 0].tolist()
        for split in ("train", "test", "test")
    )
    assert test == repeated != list(range(10))
    assert sorted(train + test) == list(range(50))
    assert len(test) == 10


def test_rows_of_neither_split_are_dropped_with_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {"numbers": [[1.0]] * 4, "brand": ["a", "b", "a", "b"], "part": ["train", "train", "val", "test"]}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, table, columns, source={"split": "part"})) == 2
    assert "1 rows are in neither split: column 'part' has the values ['val']" in caplog.text
    table["part"] = ["train"] * 4
    with pytest.raises(DataError, match=r"split 'test' has no rows.*must hold train, or test or validation"):
        load(tmp_path, table, columns, "test", source={"split": "part"})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["validation", "validation"], [2.0, 3.0]),
        (["val", "val"], [2.0, 3.0]),
        (["dev", "valid"], [3.0]),  # the rows of one name only
        (["test", "validation"], [2.0]),
    ],
)
def test_validation_rows_are_the_test_rows_of_a_file_without_test_rows(
    tmp_path: Path, names: list[str], expected: list[float]
) -> None:
    table = {"numbers": [[float(row)] for row in range(4)], "brand": ["a", "b"] * 2, "part": ["train", "train", *names]}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    numbers = NUMBERS.model_copy(update={"mean": (0.0,), "std": (1.0,)})
    rows = load(tmp_path, table, columns, "test", numbers, source={"split": "part"})
    assert all_rows(rows).arrays["numbers"][:, 0].tolist() == expected


def test_string_labels_are_numbered_by_training_rows(tmp_path: Path) -> None:
    table = {
        "numbers": [[1.0]] * 5,
        "brand": ["a", "b"] * 2 + ["a"],
        "kind": ["dog", "cat", "", "owl", "cat"],
        "part": ["train"] * 3 + ["test"] * 2,
    }
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    source = {"split": "part", "label": "kind"}
    train, test = (load(tmp_path, table, columns, split, source=source) for split in ("train", "test"))
    for rows, labels in ((train, [1, 0, -1]), (test, [-1, 0])):  # owl does not occur in training rows
        loaded = all_rows(rows).labels
        assert loaded is not None
        assert loaded.tolist() == labels
        assert rows.class_names == ("cat", "dog")


def test_bad_values_absent_treats_invalid_values_as_absent_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {"numbers": [[1.0], [1.0, 2.0], [float("nan")], [4.0]], "brand": ["a", "b", " ", None]}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    with pytest.raises(DataError, match=r"row 1, column 'numbers': .*2 entries, 1 are expected; row 2, .*finite"):
        load(tmp_path, table, columns)
    with caplog.at_level(logging.WARNING):
        rows = load(tmp_path, table, columns, bad_values="absent")
    assert all_rows(rows).present.tolist() == [[True, True], [False, True], [True, False]]
    assert rows.subsets() == {("numbers", "brand"): 1, ("brand",): 1, ("numbers",): 1}
    for message in ("2 values are treated as absent: row 1", "blank in 1 rows", "1 rows have no modality, the first are [2]"):
        assert message in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"numbers": [[1.0], None], "brand": [None, "a"]}, "column 'brand' has 1 class of brand in the training rows, 'a'"),
        ({"numbers": [[1.0], None, None], "brand": [None, "a", "b"]}, "no training row has two modalities.*shared class"),
        ({"numbers": [[1.0], [1.0]], "brand": ["", " "]}, "no training row has brand; column brand, values: 2 blank"),
    ],
)
def test_load_without_pairs_or_classes_is_rejected(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, table, {"numbers": "numbers", "brand": "brand"})


def test_modality_absent_from_all_training_rows_is_rejected(tmp_path: Path) -> None:
    table = {"numbers": [[1.0], [2.0]], "brand": ["", " "]}
    brand = CategoricalModality(name="brand", classes=("a", "b"))
    with pytest.raises(DataError, match=r"no training row has brand; values: 2 blank\. Name another column"):
        load(tmp_path, table, {"numbers": "numbers", "brand": "brand"}, "train", brand)


def test_duplicate_column_names_are_rejected(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a", "b"])] * 2, names=["brand", "brand"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = Source(train="rows.parquet", held_out=0.5, columns={"brand": "brand", "numbers": "n"}, licence="CC0")
    config = Config(name="user", modalities=(BRAND, NUMBERS), data=Data(pairing="row", sources=(source,)))
    with pytest.raises(DataError, match=r"more than one column is named \['brand'\]\. Rename"):
        dataset.load(config, "train", tmp_path)
