import hashlib
import socket
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from model.modality import BinaryModality, ImageModality, Modality, TextModality, VectorModality
from training.config import Hub, Source
from training.sources import DataError, Table, read_table

SHADE = ImageModality(name="shade", channels=1, height=2, width=2)
WORD = TextModality(name="word", length=4, alphabet=" abcd")
SIGNAL = VectorModality(name="signal", size=2)
MARKS = BinaryModality(name="marks", attributes=("big", "red"))
MODALITIES: dict[str, Modality] = {m.name: m for m in (SHADE, WORD, SIGNAL, MARKS)}
CLASSES = datasets.ClassLabel(names=["a", "bb"])


def png(level: int) -> bytes:
    return png_of(np.full((2, 2), level, np.uint8))


def png_of(levels: np.ndarray[Any, Any]) -> bytes:
    file = BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def read(
    folder: Path,
    rows: dict[str, list[Any]],
    columns: dict[str, str],
    features: dict[str, Any] | None = None,
    *,
    label: str | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Table:
    kinds = features or {}
    table = datasets.Dataset.from_dict(rows)
    for column, feature in kinds.items():
        table = table.cast_column(column, feature)
    table.to_parquet(folder / "rows.parquet")
    source = Source(train="rows.parquet", test="absent.parquet", columns=columns, label=label, licence="CC0")
    return read_table(source, "train", MODALITIES, folder, class_names)


def test_values_of_every_kind(tmp_path: Path) -> None:
    rows = {
        "image": [{"bytes": png(51), "path": None}, {"bytes": png(255), "path": None}],
        "text": ["ab", "Dad"],
        "numbers": [[0.5, -1.0], [2.0, 3.0]],
        "flags": [[0, 1], [1, 1]],
    }
    table = read(
        tmp_path,
        rows,
        {"shade": "image", "word": "text", "signal": "numbers", "marks": "flags"},
        {"image": datasets.Image(), "flags": datasets.List(datasets.Value("int8"))},
    )
    assert len(table) == 2
    assert table.columns["shade"].values.dtype == np.uint8
    assert table.columns["shade"].values.tolist() == [[[[51, 51], [51, 51]]], [[[255, 255], [255, 255]]]]
    assert table.columns["word"].values.tolist() == [[1, 2, 0, 0], [4, 1, 4, 0]]
    assert table.columns["signal"].values.tolist() == [[0.5, -1.0], [2.0, 3.0]]
    assert table.columns["marks"].values.tolist() == [[0, 1], [1, 1]]
    assert all(column.present.all() for column in table.columns.values())
    assert table.labels is None
    assert table.class_names is None


def test_images_are_stored_without_loss(tmp_path: Path) -> None:
    """All 256 levels come back; serving divides the same number by 255."""
    everything = np.arange(256, dtype=np.uint8).reshape(64, 2, 2)
    rows = {"image": [{"bytes": png_of(level), "path": None} for level in everything]}
    assert np.array_equal(read(tmp_path, rows, {"shade": "image"}).columns["shade"].values[:, 0], everything)


def test_null_is_an_absent_modality(tmp_path: Path) -> None:
    rows = {"text": ["ab", None, "d"], "numbers": [None, [1.0, 2.0], [3.0, 4.0]]}
    table = read(tmp_path, rows, {"word": "text", "signal": "numbers"})
    assert table.columns["word"].present.tolist() == [True, False, True]
    assert table.columns["signal"].present.tolist() == [False, True, True]
    assert table.columns["word"].values[1].tolist() == [0, 0, 0, 0]
    assert table.columns["signal"].values[0].tolist() == [0, 0]


def test_a_text_takes_the_name_of_a_class(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        {"kind": [1, 0, -1], "numbers": [[0.0, 0.0]] * 3},
        {"word": "kind", "signal": "numbers"},
        {"kind": CLASSES},
        label="kind",
    )
    assert table.columns["word"].values.tolist() == [[2, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert table.columns["word"].present.tolist() == [True, True, False]  # an unknown class has no name
    assert table.labels is not None
    assert table.labels.tolist() == [1, 0, -1]
    assert table.class_names == ("a", "bb")


def test_a_class_other_than_the_label_has_its_own_names(tmp_path: Path) -> None:
    rows = {"kind": [1, 0], "colour": [0, 1]}
    table = read(tmp_path, rows, {"word": "colour"}, {"colour": CLASSES}, label="kind", class_names=("c", "d"))
    assert table.columns["word"].values[:, 0].tolist() == [1, 2]
    rows["colour"] = [0, -2]
    with pytest.raises(DataError, match="row 1, label -2"):
        read(tmp_path, rows, {"word": "colour"}, {"colour": CLASSES}, label="kind")


@pytest.mark.parametrize("feature", [CLASSES, datasets.Value("int32")], ids=["ClassLabel", "integers"])
def test_configured_class_names_stand_for_those_of_the_column(tmp_path: Path, feature: Any) -> None:
    table = read(tmp_path, {"kind": [1, 0]}, {"word": "kind"}, {"kind": feature}, label="kind", class_names=("d", "c"))
    assert table.columns["word"].values[:, 0].tolist() == [3, 4]
    assert table.class_names == ("d", "c")


def test_a_null_label_is_unknown(tmp_path: Path) -> None:
    table = read(tmp_path, {"kind": [1, None], "text": ["a", "b"]}, {"word": "text"}, label="kind")
    assert table.labels is not None
    assert table.labels.tolist() == [1, -1]


def test_facts_name_the_file_and_its_hash(tmp_path: Path) -> None:
    facts = read(tmp_path, {"text": ["a", "b"]}, {"word": "text"}).facts
    assert (facts.file, facts.rows, facts.licence) == ("rows.parquet", 2, "CC0")
    assert facts.sha256 == hashlib.sha256((tmp_path / "rows.parquet").read_bytes()).hexdigest()


def test_names_with_pattern_characters_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    assert len(read(folder, {"text": ["a"]}, {"word": "text"})) == 1
    assert len(read_table(image_folder(folder), "train", MODALITIES, folder)) == 4


def test_rows_keep_their_place_over_many_chunks(tmp_path: Path) -> None:
    numbers = [[float(row), 0.0] for row in range(2500)]
    numbers[2000] = [float("nan"), 0.0]
    with pytest.raises(DataError, match=r"row 2000: column 'numbers'"):
        read(tmp_path, {"numbers": numbers}, {"signal": "numbers"})
    numbers[2000] = [2000.0, 0.0]
    table = read(tmp_path, {"numbers": numbers}, {"signal": "numbers"})
    assert np.array_equal(table.columns["signal"].values[:, 0], np.arange(2500))


def image_folder(path: Path) -> Source:
    for kind, level in (("cat", 10), ("test", 20)):  # a class of this name must not become a split
        (path / "images" / kind).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (2, 2), level + index).save(path / "images" / kind / f"{index}.png")
    return Source(train="images", test="images", columns={"shade": "image"}, label="label", licence="CC0")


def test_a_folder_of_images_a_class(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    table = read_table(source, "train", MODALITIES, tmp_path)
    assert table.labels is not None
    assert table.class_names == ("cat", "test")
    levels = table.columns["shade"].values[:, 0, 0, 0]
    assert sorted(zip(table.labels.tolist(), levels.tolist(), strict=True)) == [(0, 10), (0, 11), (1, 20), (1, 21)]


def test_a_folder_may_hold_one_class(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("L", (2, 2), 9).save(tmp_path / "images" / "cat" / "0.png")
    source = Source(train="images", test="images", columns={"shade": "image"}, label="label", licence="CC0")
    assert read_table(source, "train", MODALITIES, tmp_path).class_names == ("cat",)


def test_the_hash_of_a_folder_follows_its_content(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    before = read_table(source, "train", MODALITIES, tmp_path).facts.sha256
    assert read_table(source, "test", MODALITIES, tmp_path).facts.sha256 == before
    Image.new("L", (2, 2), 99).save(tmp_path / "images" / "cat" / "0.png")
    assert read_table(source, "train", MODALITIES, tmp_path).facts.sha256 != before


def test_local_files_are_read_without_a_word_to_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    read(tmp_path, {"text": ["a"]}, {"word": "text"})
    read_table(image_folder(tmp_path), "train", MODALITIES, tmp_path)
    assert asked == []


@pytest.mark.parametrize(
    ("rows", "columns", "features", "label", "message"),
    [
        ({"text": ["a"]}, {"word": "words"}, {}, None, r"rows\.parquet: no column \['words'\]\. Its columns are \['text'\]"),
        ({"text": ["a"]}, {"word": "text"}, {}, "kind", r"no column \['kind'\]"),
        (
            {"text": []},
            {"word": "text"},
            {"text": datasets.Value("string")},
            None,
            r"rows\.parquet: cannot be opened .*no data.*Check that it is .*not empty",
        ),
        (
            {"text": ["a", "axe"]},
            {"word": "text"},
            {},
            None,
            r"row 1: column 'text' holds no word: characters outside.*'e', 'x'.*null",
        ),
        ({"text": [1, 2]}, {"word": "text"}, {}, None, r"row 0: column 'text' holds no word: a text is a string"),
        (
            {"text": ["a", None, None]},
            {"word": "text"},
            {},
            None,
            r"2 rows hold no modality at all, the first are \[1, 2\]\. Remove",
        ),
        ({"image": [b"GIF89a"]}, {"shade": "image"}, {}, None, r"row 0: column 'image' holds no shade: the content is GIF"),
        ({"image": [png(0), png(0)[:-30]]}, {"shade": "image"}, {}, None, r"row 1: .*damaged or cut short.*Repair or remove"),
        ({"image": [3]}, {"shade": "image"}, {}, None, r"row 0: .*image files as \{bytes, path\}, received int"),
        ({"image": [{"bytes": None, "path": "gone.png"}]}, {"shade": "image"}, {}, None, r"row 0: .*No such file.*gone\.png"),
        ({"numbers": [[1.0, float("nan")]]}, {"signal": "numbers"}, {}, None, r"row 0: .*number 1 is not finite"),
        ({"flags": [[0, 2]]}, {"marks": "flags"}, {}, None, r"row 0: .*red must be 0, 1"),
        (
            {"text": ["a"], "kind": [0.5]},
            {"word": "text"},
            {},
            "kind",
            r"the label column 'kind' holds Value\('float64'\)\. Labels are a ClassLabel, strings or",
        ),
        ({"text": ["a"], "kind": [-2]}, {"word": "text"}, {}, "kind", r"row 0, label -2: class numbers are 0 and above"),
    ],
)
def test_bad_data_is_refused_with_file_row_and_remedy(
    *, tmp_path: Path, rows: dict[str, Any], columns: dict[str, str], features: dict[str, Any], label: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, columns, features, label=label)


def test_class_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'kind' has 2 classes, data\.class_names names 3"):
        read(tmp_path, {"kind": [0]}, {"word": "kind"}, {"kind": CLASSES}, label="kind", class_names=("a", "b", "c"))
    with pytest.raises(DataError, match=r"row 1, label 5: class numbers are 0 to 1"):
        read(tmp_path, {"kind": [0, 5]}, {"word": "kind"}, {}, label="kind", class_names=("a", "b"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.parquet", r"nowhere\.parquet: no such file or folder\. Name the data folder with --data, CONCORD_DATA"),
        ("table.csv", r"table\.csv: a source is a \.parquet file or a folder"),
        ("broken.parquet", r"broken\.parquet: cannot be opened \(.*Check that it is whole"),
        ("hollow", r"hollow: cannot be opened \("),
    ],
)
def test_a_place_that_cannot_be_read_is_named(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
    (tmp_path / "hollow").mkdir()
    source = Source(train=place, test=place, columns={"word": "text"}, licence="CC0")
    with pytest.raises(DataError, match=message):
        read_table(source, "train", MODALITIES, tmp_path)


def test_the_hub_is_asked_and_its_absence_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    place = Hub(hub="ufldl-stanford/svhn", config="cropped_digits", split="train")
    source = Source(train=place, test=place, columns={"shade": "image"}, label="label", licence="research")
    with pytest.raises(
        DataError, match=r"ufldl-stanford/svhn:cropped_digits:train: cannot be opened \(.*connection to the hub"
    ):
        read_table(source, "train", MODALITIES, tmp_path)
