"""What people's files hold: several texts a row, numbers in columns of their own, classes by name, splits in one file."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from training import data
from training.config import Config, Data, Source
from training.sources import DataError

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
) -> data.Dataset:
    datasets.Dataset.from_dict(table).to_parquet(folder / "rows.parquet")
    known: dict[str, Modality] = {m.name: m for m in (TITLE, CODE, BRAND, SIZE, TRAITS, SCAN, NUMBERS, *modalities)}
    parts = source or {"test": "rows.parquet"}
    place = Source(train="rows.parquet", columns=columns, licence="CC0", **parts)
    table_of_data = Data(pairing="row", sources=(place,), **settings)
    return data.load(Config(name="own", modalities=tuple(known[name] for name in columns), data=table_of_data), split, folder)


def every_row(rows: data.Dataset) -> data.Batch:
    return next(rows.batches(0, len(rows), 0, shuffle=False))


def test_what_rows_tell_is_learned_from_training_rows_alone(tmp_path: Path) -> None:
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
    assert code.alphabet == " ab\ufffd"  # what one row alone has, no word or character of its own
    assert brand.classes == ("acme", "zenith")
    assert test.modalities == train.modalities
    assert (len(train), len(test)) == (4, 2)
    batch = every_row(train)
    assert batch.arrays["title"].tolist() == [[2, 3, 0, 0], [2, 1, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.arrays["code"].tolist()[3] == [3, 0, 0, 0]
    assert batch.arrays["brand"].tolist() == [[0], [1], [0], [0]]
    assert batch.present.tolist() == [[True, True, True], [True, True, True], [True, True, False], [True, True, True]]
    assert every_row(test).arrays["title"].tolist() == [[1, 1, 0, 0]] * 2


def test_a_vocabulary_keeps_the_most_frequent_words(tmp_path: Path) -> None:
    table = {"title": ["a b", "a b", "a c", "a c", "c"], "numbers": [[1.0]] * 5}
    rows = load(tmp_path, table, {"title": "title", "numbers": "numbers"}, max_vocabulary=2)
    title = rows.modalities[0]
    assert isinstance(title, TextModality)
    assert title.vocabulary == ("a", "c")


def test_one_of_several_texts_is_drawn_anew_each_epoch(tmp_path: Path) -> None:
    table = {"title": [["a", "b", "c"], None, ["b", " "], []], "numbers": [[1.0], [2.0], [3.0], [4.0]]}
    title = TITLE.model_copy(update={"vocabulary": ("a", "b", "c")})
    rows = load(tmp_path, table, {"title": "title", "numbers": "numbers"}, "train", title)
    batch = every_row(rows)
    assert batch.present[:, 0].tolist() == [True, False, True, False]
    assert batch.arrays["title"][:, 0].tolist() == [2, 0, 3, 0]  # the first, where nothing is drawn
    drawn = []
    for epoch in range(200):
        (batch,) = rows.batches(epoch, 4, 7)
        order = np.argsort(batch.arrays["numbers"][:, 0].numpy())
        drawn.append(batch.arrays["title"][order][:, 0].tolist())
    assert {tuple(words[1:]) for words in drawn} == {(0, 3, 0)}
    counts = np.bincount([words[0] for words in drawn], minlength=5)[2:5]
    assert counts.sum() == 200
    assert np.all(counts > 40)
    whole = [batch.arrays["title"].tolist() for batch in rows.batches(3, 2, 7)]
    assert [batch.arrays["title"].tolist() for batch in rows.batches(3, 2, 7, start=1)] == whole[1:]


def test_single_numbers_make_up_a_vector_and_attributes(tmp_path: Path) -> None:
    table = {
        "width": [1.0, 3.0, None, float("nan")],
        "height": [2, 4, None, None],
        "new": [True, False, None, True],
        "red": [1, 0, None, 0],
    }
    size = SIZE.model_copy(update={"mean": (0.0, 0.0), "std": (1.0, 1.0)})
    columns: dict[str, str | tuple[str, ...]] = {"size": ("width", "height"), "traits": ("new", "red"), "numbers": "red"}
    batch = every_row(load(tmp_path, table, columns, "train", size, bad_values="absent"))
    assert len(batch.present) == 3  # one row has nothing
    assert batch.present.tolist() == [[True] * 3, [True] * 3, [False, True, True]]
    assert batch.arrays["size"].tolist()[:2] == [[1, 2], [3, 4]]
    assert batch.arrays["traits"].tolist() == [[1, 1], [0, 0], [1, 0]]


def test_a_vector_in_parts_is_no_vector(tmp_path: Path) -> None:
    table = {"width": [1.0, 3.0], "height": [2.0, None], "brand": ["a", "b"]}
    columns: dict[str, str | tuple[str, ...]] = {"size": ("width", "height"), "brand": "brand"}
    with pytest.raises(DataError, match=r"row 1: column 'width', 'height' holds no size: height missing.*bad_values"):
        load(tmp_path, table, columns)


def test_pictures_of_any_number_of_channels_are_nested_lists(tmp_path: Path) -> None:
    picture = [[[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.0], [1.0, 1.0]]]
    table = {"scan": [picture, picture, None], "brand": ["a", "b", "a"]}
    batch = every_row(load(tmp_path, table, {"scan": "scan", "brand": "brand"}))
    assert batch.arrays["scan"].tolist() == [picture, picture, np.zeros((2, 2, 2)).tolist()]
    table["scan"][1] = picture[:1]
    with pytest.raises(DataError, match=r"row 1: column 'scan' holds no scan: the shape must be \[2, 2, 2\]"):
        load(tmp_path, table, {"scan": "scan", "brand": "brand"})


def test_a_share_is_held_out_once_and_for_all(tmp_path: Path) -> None:
    table = {"numbers": [[float(row)] for row in range(50)], "brand": ["a", "b"] * 25}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    given = NUMBERS.model_copy(update={"mean": (0.0,), "std": (1.0,)})
    source = {"held_out": 0.2}
    parts = [
        every_row(load(tmp_path, table, columns, split, given, source=source)).arrays["numbers"][:, 0].tolist()
        for split in ("train", "test", "test")
    ]
    assert parts[1] == parts[2] != list(range(10))
    assert sorted(parts[0] + parts[1]) == list(range(50))
    assert len(parts[1]) == 10


def test_rows_of_another_split_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {"numbers": [[1.0]] * 4, "brand": ["a", "b", "a", "b"], "part": ["train", "train", "val", "test"]}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, table, columns, source={"split": "part"})) == 2
    assert "1 rows are of neither split: column 'part' says ['val']" in caplog.text
    table["part"] = ["train"] * 4
    with pytest.raises(DataError, match="no row is of split 'test'"):
        load(tmp_path, table, columns, "test", source={"split": "part"})


def test_labels_may_be_names(tmp_path: Path) -> None:
    table = {
        "numbers": [[1.0]] * 5,
        "brand": ["a", "b"] * 2 + ["a"],
        "kind": ["dog", "cat", "", "owl", "cat"],
        "part": ["train"] * 3 + ["test"] * 2,
    }
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    source = {"split": "part", "label": "kind"}
    train, test = (load(tmp_path, table, columns, split, source=source) for split in ("train", "test"))
    for rows, labels in ((train, [1, 0, -1]), (test, [-1, 0])):  # nobody trained on owls
        found = every_row(rows).labels
        assert found is not None
        assert found.tolist() == labels
        assert rows.class_names == ("cat", "dog")


def test_bad_values_count_as_absent_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {"numbers": [[1.0], [1.0, 2.0], [float("nan")], [4.0]], "brand": ["a", "b", " ", None]}
    columns: dict[str, str | tuple[str, ...]] = {"numbers": "numbers", "brand": "brand"}
    with pytest.raises(DataError, match=r"row 1: column 'numbers' .*2 entries, 1 are expected; row 2: .*finite"):
        load(tmp_path, table, columns)
    with caplog.at_level(logging.WARNING):
        rows = load(tmp_path, table, columns, bad_values="absent")
    assert every_row(rows).present.tolist() == [[True, True], [False, True], [True, False]]
    assert rows.subsets() == {("numbers", "brand"): 1, ("brand",): 1, ("numbers",): 1}
    for told in ("2 values count as absent: row 1", "blank in 1 rows", "1 rows hold no modality at all, the first are [2]"):
        assert told in caplog.text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"numbers": [[1.0], None], "brand": [None, "a"]}, "column 'brand' holds 1 classes"),
        ({"numbers": [[1.0], None, None], "brand": [None, "a", "b"]}, "no training row holds two modalities.*class they share"),
        ({"numbers": [[1.0], [1.0]], "brand": ["", " "]}, "holds 0 classes of brand"),
    ],
)
def test_what_cannot_be_aligned_is_refused(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, table, {"numbers": "numbers", "brand": "brand"})


def test_a_modality_that_no_training_row_holds_is_refused(tmp_path: Path) -> None:
    table = {"numbers": [[1.0], [2.0]], "brand": ["", " "]}
    brand = CategoricalModality(name="brand", classes=("a", "b"))
    with pytest.raises(DataError, match="no training row holds brand: name another column"):
        load(tmp_path, table, {"numbers": "numbers", "brand": "brand"}, "train", brand)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.table([pyarrow.array(["a", "b"])] * 2, names=["brand", "brand"])
    pyarrow.parquet.write_table(twice, tmp_path / "rows.parquet")
    source = Source(train="rows.parquet", held_out=0.5, columns={"brand": "brand", "numbers": "n"}, licence="CC0")
    config = Config(name="own", modalities=(BRAND, NUMBERS), data=Data(pairing="row", sources=(source,)))
    with pytest.raises(DataError, match=r"several columns are named \['brand'\]\. Rename"):
        data.load(config, "train", tmp_path)
