"""Files as users have them: odd names and places, large row groups, replaced and damaged files, folders of pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concord.model.modality import CategoricalModality, ImageModality, VectorModality
from concord.training.config import Config, Data, Source
from concord.training.data import dataset
from concord.training.data.infer_schema import infer_schema
from concord.training.data.sources import open_table
from concord.training.data.tables import ParquetTable
from concord.training.errors import DataError
from tests.support.server import ROOT

NUMBER = VectorModality(name="number", size=1, mean=(0.0,), std=(1.0,))
BRAND = CategoricalModality(name="brand", classes=("a", "b"))
PHOTO = ImageModality(name="photo", channels=1, height=2, width=2)


def load(folder: Path, train: str, columns: dict[str, str], *modalities: Any) -> dataset.Dataset:
    source = Source(train=train, test=train, columns=columns, licence="CC0")
    return dataset.load(
        Config(name="user", modalities=modalities, data=Data(pairing="row", sources=(source,))), "train", folder
    )


@pytest.mark.parametrize("name", ["写真 #1 100%.parquet", "[2026] shop.pq", "a b/C.PARQUET", "ü/x.Pq"])
def test_parquet_file_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"n": [1.0, 2.0], "brand": ["a", "b"]}), tmp_path / name)
    rows = load(tmp_path, name, {"number": "n", "brand": "brand"}, NUMBER, BRAND)
    assert (len(rows), rows.sources[0].file) == (2, name)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=2, max_size=6, unique=True))
def test_columns_of_any_name_are_read(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "names.parquet"
    pq.write_table(pa.table({name: [index, None] for index, name in enumerate(names)}), path)
    table = ParquetTable(path, "names")
    assert table.column_names == names
    for index, name in enumerate(names):
        assert [batch.to_pydict() for batch in table.batches([name])] == [{name: [index, None]}]
        assert table.null_count(name) == 1
    (batch,) = table.batches(names[::-1])
    assert batch.to_pydict() == {name: [index, None] for index, name in reversed(list(enumerate(names)))}


def test_column_names_with_dots_are_not_parts_of_a_struct(tmp_path: Path) -> None:
    columns = {"a": [{"b": 1}, None], "a.b": [2, None], "a.b.c": [3, 4]}
    pq.write_table(pa.table(columns), tmp_path / "dots.parquet")
    table = ParquetTable(tmp_path / "dots.parquet", "dots")
    for name, values in columns.items():
        (batch,) = table.batches([name])
        assert batch.to_pydict() == {name: values}


def test_rows_are_those_of_the_file_when_it_is_replaced_with_the_same_time(tmp_path: Path) -> None:
    for numbers in ([1.0, 2.0], [7.0, 8.0]):
        pq.write_table(pa.table({"n": numbers, "brand": ["a", "b"]}), tmp_path / "rows.parquet")
        os.utime(tmp_path / "rows.parquet", (1e9, 1e9))
        rows = load(tmp_path, "rows.parquet", {"number": "n", "brand": "brand"}, NUMBER, BRAND)
        assert rows.columns["number"].values[:, 0].tolist() == numbers


def test_file_that_changes_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1.0]}), tmp_path / "rows.parquet")
    table = ParquetTable(tmp_path / "rows.parquet", "rows.parquet")
    assert table.sha256() == table.sha256()
    pq.write_table(pa.table({"n": [1.0, 2.0]}), tmp_path / "new.parquet")
    (tmp_path / "new.parquet").rename(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="was changed while it was read"):
        table.sha256()


def test_damage_in_a_column_names_the_column_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": np.arange(1000.0)}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:800] = bytes(600)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: columns n: rows from 0 on cannot be read .* write it again"):
        list(open_table("rows.parquet", tmp_path).batches(["n"]))


READ = """
import resource, sys
from pathlib import Path
from concord.training.data.infer_schema import infer_schema
from concord.training.data.memmap import moments
from concord.training.data.tables import ParquetTable

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def read(path):
    table = ParquetTable(path, "rows")
    schemas = infer_schema(table)
    return len(schemas), sum(len(batch) for batch in table.batches(table.column_names))

read(Path(sys.argv[1]))
before = peak()
print(*read(Path(sys.argv[2])), peak() - before)
"""


@pytest.mark.parametrize("wide", [True, False])
def test_memory_does_not_grow_with_the_rows_of_one_row_group(tmp_path: Path, wide: bool) -> None:
    for name, rows in (("small", 10_000), ("large", 150_000)):
        numbers = np.random.default_rng(0).normal(size=(rows, 32))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 32)
        table = {f"n{index}": numbers[:, index] for index in range(32)} if wide else {"n": lists}
        options = {"row_group_size": rows, "use_dictionary": False, "data_page_size": 1 << 16}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet", **options)
    command = [sys.executable, "-c", READ, str(tmp_path / "small.parquet"), str(tmp_path / "large.parquet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    schemas, rows, growth = map(int, done.stdout.split())
    assert (schemas, rows) == (1, 150_000)
    assert growth < 16 * 1024  # KiB; the numbers are 37 MiB


LOAD = """
import sys
from pathlib import Path
from concord.model.modality import CategoricalModality, VectorModality
from concord.training.config import Config, Data, Source
from concord.training.data import dataset

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

def load(name):
    columns = {"numbers": sys.argv[2].split(","), "brand": "brand"}
    source = Source(train=name, held_out=0.1, columns=columns, licence="CC0")
    modalities = (VectorModality(name="numbers", size=32), CategoricalModality(name="brand"))
    config = Config(name="user", modalities=modalities, data=Data(pairing="row", sources=(source,)))
    return [dataset.load(config, split, Path(sys.argv[1])) for split in ("train", "test")]

load("small.parquet")
before = peak()
rows = load("large.parquet")
print(sum(map(len, rows)), sum(column.values.nbytes for part in rows for column in part.columns.values()), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("wide", [True, False])
def test_memory_of_loading_is_that_of_the_parsed_values(tmp_path: Path, wide: bool) -> None:
    for name, rows in (("small", 5_000), ("large", 150_000)):
        numbers = np.random.default_rng(0).normal(size=(rows, 32))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), 32)
        table = {f"n{index}": numbers[:, index] for index in range(32)} if wide else {"n": lists}
        columns = ",".join(table)
        table["brand"] = pa.array(["acme", "zenith"] * (rows // 2))
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet", row_group_size=rows, use_dictionary=["brand"])
    command = [sys.executable, "-c", LOAD, str(tmp_path), columns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    rows, size, growth = map(int, done.stdout.split())
    assert (rows, size) == (150_000, 150_000 * (32 * 4 + 8))
    assert growth < size / 1024 + 24 * 1024, "KiB; the numbers in the file are 37 MiB, and their Python objects 150 MiB"


def pictures(folder: Path, *names: str) -> None:
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), level).save(folder / name)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_pictures_that_the_metadata_does_not_name_are_kept_and_counted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path / "shop", "0.png", "1.png", "more/2.png", "more/写真 3.png", ".hidden/4.png")
    rows = [{"file_name": "1.png", "brand": "b", "n": 1.5}, {"file_name": "more/2.png", "brand": "a", "n": None}]
    file = tmp_path / "shop" / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        file.write_text("file_name,brand,n\r\n1.png,b,1.5\r\nmore/2.png,a,\r\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    with caplog.at_level("INFO"):
        loaded = load(tmp_path, "shop", {"photo": "image", "brand": "brand", "number": "n"}, PHOTO, BRAND, NUMBER)
    batch = next(loaded.batches(0, 4, 0, shuffle=False))
    assert (batch.arrays["photo"][:, 0, 0, 0] * 255).round().tolist() == [1, 2, 0, 3]
    assert batch.present.tolist() == [[True, True, True], [True, True, False], [True, False, False], [True, False, False]]
    note = f"shop: 2 of 4 pictures are not named by metadata.{kind}. Their brand, n are absent. The first is 0.png"
    assert loaded.notes == [note]
    assert note in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "../secret.png"}', r"file_name '\.\./secret\.png' is no path inside the folder"),
        ('{"file_name": "/etc/passwd"}', "is no path inside the folder"),
        ('{"name": "0.png"}', "no column is file_name"),
        ('{"file_name": ', r"metadata\.jsonl: cannot be read"),
    ],
)
def test_metadata_that_cannot_be_used_is_rejected(tmp_path: Path, content: str, message: str) -> None:
    pictures(tmp_path / "shop", "0.png")
    (tmp_path / "shop" / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        open_table("shop", tmp_path)


def test_schema_of_a_folder_of_pictures_is_inferred(tmp_path: Path) -> None:
    pictures(tmp_path / "shop", "cup/0.png", "cup/1.JPG", "lamp/2.jpeg")
    roles = {schema.columns: (schema.role, schema.note) for schema in infer_schema(open_table("shop", tmp_path))}
    assert roles == {("image",): ("image", "images, all 2 x 2"), ("label",): ("label", "2 classes")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture is in the folder"):
        open_table("empty", tmp_path)
