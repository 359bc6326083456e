"""Parsed columns on disk: a later run reads the same values without parsing, and a changed file is parsed again."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from concord.model.modality import ImageModality, TextModality
from concord.training.config import Source
from concord.training.data import sources
from concord.training.data.sources import Table, read_table

PHOTO = ImageModality(name="photo", channels=3, height=4, width=4)
TITLE = TextModality(name="title", length=3, unit="word", vocabulary=("red", "cup"))
SOURCE = Source(train="shop.parquet", held_out=0.25, columns={"photo": "photo", "title": "title"}, licence="none")


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 5), (shade, 0, 255 - shade)).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, photos: list[Any]) -> None:
    titles = [["red cup", "cup"], ["cup"], None, ["red"], [""], ["red", "red", "cup"], ["cup"], ["red"]]
    pq.write_table(pa.table({"photo": photos, "title": titles[: len(photos)]}), folder / "shop.parquet")


def read(folder: Path, split: sources.Split = "train") -> Table:
    return read_table(SOURCE, split, {"photo": PHOTO, "title": TITLE}, folder, bad_values="absent", cache=folder / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, [picture(30 * number) if number != 3 else None for number in range(8)])
    return tmp_path


def assert_same(table: Table, expected: Table) -> None:
    for name, column in table.columns.items():
        other = expected.columns[name]
        assert np.array_equal(column.values, other.values)
        assert np.array_equal(column.present, other.present)
        assert (column.starts is None) == (other.starts is None)
        assert column.starts is None or np.array_equal(column.starts, other.starts)
        assert (column.blank, column.unseen, column.notes) == (other.blank, other.unseen, other.notes)


def no_parsing(*_: Any, **__: Any) -> Any:
    raise AssertionError("a cached column was parsed")


@pytest.mark.parametrize("split", ["train", "test"])
def test_second_run_reads_the_same_values_without_parsing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, split: sources.Split
) -> None:
    first = read(folder, split)
    plain = read_table(SOURCE, split, {"photo": PHOTO, "title": TITLE}, folder, bad_values="absent")
    monkeypatch.setattr(sources, "parse_column", no_parsing)
    assert_same(read(folder, split), first)
    assert_same(first, plain)


def test_changed_file_or_modality_is_parsed_again(folder: Path) -> None:
    before = read(folder)
    write(folder, [picture(10 * number) for number in range(8)])
    assert not np.array_equal(read(folder).columns["photo"].values, before.columns["photo"].values)
    larger = PHOTO.model_copy(update={"height": 5, "width": 5})
    table = read_table(SOURCE, "train", {"photo": larger, "title": TITLE}, folder, bad_values="absent", cache=folder / "cache")
    assert table.columns["photo"].values.shape[1:] == (3, 5, 5)


def test_pictures_in_files_of_their_own_and_unreadable_values_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    for photos in (["a.png"] * 8, [{"bytes": None, "path": "a.png"}] * 8, [b"no picture", *([picture(0)] * 7)]):
        write(tmp_path, photos)
        read(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(sources, "parse_column", no_parsing)
            with pytest.raises(AssertionError, match="was parsed"):
                read(tmp_path)


def test_damaged_entry_is_parsed_again_and_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    first = read(folder)
    for file in (folder / "cache").glob("*/values.npy"):
        file.write_bytes(b"")
    assert_same(read(folder), first)
    assert "is parsed again" in caplog.text
    monkeypatch.setattr(sources, "parse_column", no_parsing)
    assert_same(read(folder), first)


def test_folder_that_cannot_be_written_is_a_warning(folder: Path, caplog: Any) -> None:
    (folder / "cache").write_text("a file")
    assert len(read(folder)) == 6
    assert "parsed values are not kept" in caplog.text
