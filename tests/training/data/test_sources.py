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

from concord.model.modality import BinaryModality, ImageModality, Modality, TextModality, VectorModality
from concord.training.config import Hub, Source
from concord.training.data.sources import Table, read_table
from concord.training.errors import DataError

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
    table = datasets.Dataset.from_dict(rows)
    for column, feature in (features or {}).items():
        table = table.cast_column(column, feature)
    table.to_parquet(folder / "rows.parquet")
    source = Source(train="rows.parquet", test="absent.parquet", columns=columns, label=label, licence="CC0")
    return read_table(source, "train", MODALITIES, folder, class_names)


def test_read_table_parses_every_modality_kind(tmp_path: Path) -> None:
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


def test_images_keep_all_256_levels(tmp_path: Path) -> None:
    """Batches divide them by 255, as the service does."""
    levels = np.arange(256, dtype=np.uint8).reshape(64, 2, 2)
    rows = {"image": [{"bytes": png_of(image), "path": None} for image in levels]}
    assert np.array_equal(read(tmp_path, rows, {"shade": "image"}).columns["shade"].values[:, 0], levels)


def test_null_is_read_as_absent_modality(tmp_path: Path) -> None:
    rows = {"text": ["ab", None, "d"], "numbers": [None, [1.0, 2.0], [3.0, 4.0]]}
    table = read(tmp_path, rows, {"word": "text", "signal": "numbers"})
    assert table.columns["word"].present.tolist() == [True, False, True]
    assert table.columns["signal"].present.tolist() == [False, True, True]
    assert table.columns["word"].values[1].tolist() == [0, 0, 0, 0]
    assert table.columns["signal"].values[0].tolist() == [0, 0]


def test_text_from_class_column_is_the_class_name(tmp_path: Path) -> None:
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


def test_class_column_other_than_label_keeps_its_names(tmp_path: Path) -> None:
    rows = {"kind": [1, 0], "colour": [0, 1]}
    table = read(tmp_path, rows, {"word": "colour"}, {"colour": CLASSES}, label="kind", class_names=("c", "d"))
    assert table.columns["word"].values[:, 0].tolist() == [1, 2]
    rows["colour"] = [0, -2]
    with pytest.raises(DataError, match=r"row 1, column 'colour': .*class number -2: the column's classes have the numbers 0"):
        read(tmp_path, rows, {"word": "colour"}, {"colour": CLASSES}, label="kind")


@pytest.mark.parametrize("feature", [CLASSES, datasets.Value("int32")], ids=["ClassLabel", "integers"])
def test_configured_class_names_replace_those_of_the_label_column(tmp_path: Path, feature: Any) -> None:
    table = read(tmp_path, {"kind": [1, 0]}, {"word": "kind"}, {"kind": feature}, label="kind", class_names=("d", "c"))
    assert table.columns["word"].values[:, 0].tolist() == [3, 4]
    assert table.class_names == ("d", "c")


def test_null_label_is_unknown(tmp_path: Path) -> None:
    table = read(tmp_path, {"kind": [1, None], "text": ["a", "b"]}, {"word": "text"}, label="kind")
    assert table.labels is not None
    assert table.labels.tolist() == [1, -1]


def test_table_source_has_file_name_rows_licence_and_hash(tmp_path: Path) -> None:
    source = read(tmp_path, {"text": ["a", "b"]}, {"word": "text"}).source
    assert (source.file, source.rows, source.licence) == ("rows.parquet", 2, "CC0")
    assert source.sha256 == hashlib.sha256((tmp_path / "rows.parquet").read_bytes()).hexdigest()


def test_folder_name_with_glob_characters_is_literal(tmp_path: Path) -> None:
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    assert len(read(folder, {"text": ["a"]}, {"word": "text"})) == 1
    assert len(read_table(image_folder(folder), "train", MODALITIES, folder)) == 4


def test_rows_over_many_chunks_keep_their_order_and_numbers(tmp_path: Path) -> None:
    numbers = [[float(row), 0.0] for row in range(2500)]
    numbers[2000] = [float("nan"), 0.0]
    with pytest.raises(DataError, match=r"row 2000, column 'numbers'"):
        read(tmp_path, {"numbers": numbers}, {"signal": "numbers"})
    numbers[2000] = [2000.0, 0.0]
    table = read(tmp_path, {"numbers": numbers}, {"signal": "numbers"})
    assert np.array_equal(table.columns["signal"].values[:, 0], np.arange(2500))


def image_folder(path: Path) -> Source:
    for kind, level in (("cat", 10), ("test", 20)):  # a class named test must not become a split
        (path / "images" / kind).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (2, 2), level + index).save(path / "images" / kind / f"{index}.png")
    return Source(train="images", test="images", columns={"shade": "image"}, label="label", licence="CC0")


def test_image_folder_gives_one_class_per_subfolder(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    table = read_table(source, "train", MODALITIES, tmp_path)
    assert table.labels is not None
    assert table.class_names == ("cat", "test")
    levels = table.columns["shade"].values[:, 0, 0, 0]
    assert sorted(zip(table.labels.tolist(), levels.tolist(), strict=True)) == [(0, 10), (0, 11), (1, 20), (1, 21)]


def test_image_folder_with_one_class_is_read(tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("L", (2, 2), 9).save(tmp_path / "images" / "cat" / "0.png")
    source = Source(train="images", test="images", columns={"shade": "image"}, label="label", licence="CC0")
    assert read_table(source, "train", MODALITIES, tmp_path).class_names == ("cat",)


def test_image_folder_hash_changes_with_its_content(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    before = read_table(source, "train", MODALITIES, tmp_path).source.sha256
    assert read_table(source, "test", MODALITIES, tmp_path).source.sha256 == before
    Image.new("L", (2, 2), 99).save(tmp_path / "images" / "cat" / "0.png")
    assert read_table(source, "train", MODALITIES, tmp_path).source.sha256 != before


def test_reading_local_files_makes_no_network_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[object] = []

    def fail(*address: object, **_: object) -> None:
        addresses.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)
    read(tmp_path, {"text": ["a"]}, {"word": "text"})
    read_table(image_folder(tmp_path), "train", MODALITIES, tmp_path)
    assert addresses == []


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
            r"row 1, column 'text': invalid word: characters outside.*'e', 'x'.*null",
        ),
        ({"text": [1, 2]}, {"word": "text"}, {}, None, r"row 0, column 'text': invalid word: a text is a string"),
        (
            {"text": ["a", None, None]},
            {"word": "text"},
            {},
            None,
            r"2 rows have no modality, the first are \[1, 2\]\. Remove",
        ),
        ({"image": [b"GIF89a"]}, {"shade": "image"}, {}, None, r"row 0, column 'image': invalid shade: the content is GIF"),
        ({"image": [png(0), png(0)[:-30]]}, {"shade": "image"}, {}, None, r"row 1, .*damaged or cut short.*Repair or remove"),
        ({"image": [3]}, {"shade": "image"}, {}, None, r"row 0, .*as \{bytes, path\}, as bytes .*; received int"),
        ({"image": [{"bytes": None, "path": "gone.png"}]}, {"shade": "image"}, {}, None, r"row 0, .*no such file: 'gone\.png'"),
        ({"numbers": [[1.0, float("nan")]]}, {"signal": "numbers"}, {}, None, r"row 0, .*number 1 is not finite"),
        ({"flags": [[0, 2]]}, {"marks": "flags"}, {}, None, r"row 0, .*red must be 0, 1"),
        (
            {"text": ["a"], "kind": [0.5]},
            {"word": "text"},
            {},
            "kind",
            r"row 0, label 0\.5: class numbers are whole numbers, 0 and above",
        ),
        ({"text": ["a"], "kind": [-2]}, {"word": "text"}, {}, "kind", r"row 0, label -2: class numbers are whole"),
    ],
)
def test_invalid_data_error_names_row_column_and_remedy(
    *, tmp_path: Path, rows: dict[str, Any], columns: dict[str, str], features: dict[str, Any], label: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, columns, features, label=label)


def test_class_names_that_do_not_fit_the_labels_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'kind' has 2 classes, data\.class_names names 3"):
        read(tmp_path, {"kind": [0]}, {"word": "kind"}, {"kind": CLASSES}, label="kind", class_names=("a", "b", "c"))
    with pytest.raises(DataError, match=r"row 1, label 5: class numbers are 0 to 1"):
        read(tmp_path, {"kind": [0, 5]}, {"word": "kind"}, {}, label="kind", class_names=("a", "b"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.parquet", r"nowhere\.parquet: no such file or folder\. Set the data folder with --data, CONCORD_DATA"),
        ("table.csv", r"table\.csv: a source must be a file that ends in \.parquet or \.pq, or a folder"),
        ("broken.parquet", r"broken\.parquet: cannot be opened \(.*Check that it is complete"),
        ("hollow", r"hollow: cannot be opened \("),
    ],
)
def test_unreadable_source_error_names_the_source(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
    (tmp_path / "hollow").mkdir()
    source = Source(train=place, test=place, columns={"word": "text"}, licence="CC0")
    with pytest.raises(DataError, match=message):
        read_table(source, "train", MODALITIES, tmp_path)


def test_unreachable_hub_error_names_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    place = Hub(hub="ufldl-stanford/svhn", config="cropped_digits", split="train")
    source = Source(train=place, test=place, columns={"shade": "image"}, label="label", licence="research")
    with pytest.raises(
        DataError, match=r"ufldl-stanford/svhn:cropped_digits:train: cannot be opened \(.*connection to the hub"
    ):
        read_table(source, "train", MODALITIES, tmp_path)
