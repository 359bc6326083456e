"""From a Parquet file to a configuration: what columns are taken for, what is told of them, what is refused and how."""

import io
import re
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from tests.training.shop import photo, write_shop
from training import config_file
from training.__main__ import app
from training.draft import name_modalities
from training.guess import Guess, guess


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def table_of(rows: dict[str, list[Any]], **features: Any) -> datasets.Dataset:
    table = datasets.Dataset.from_dict(rows)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    return table


def repeated(*values: Any) -> list[Any]:
    return list(values) * (24 // len(values))


def png(mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "values", "role", "fields"),
    [
        ("scan", repeated(png("L", (20, 30)), None), "image", {"channels": 1, "height": 30, "width": 20}),
        ("photo", repeated(png("RGB", (20, 30)), png("L", (20, 30))), "image", {"channels": 3, "height": 30, "width": 20}),
        ("photo", repeated(png("RGB", (20, 30)), png("RGB", (30, 20))), "image", {"channels": 3, "height": 64, "width": 64}),
        ("photo", repeated(png("RGB", (200, 200))), "image", {"channels": 3, "height": 64, "width": 64}),
        ("cube", repeated(np.zeros((4, 5, 6)).tolist()), "image", {"channels": 4, "height": 5, "width": 6}),
        ("title", [f"cup number {n}" for n in range(24)], "text", {"unit": "word", "length": 3}),
        ("story", ["word " * 99] * 24, "text", {"unit": "word", "length": 32, "too_long": "cut"}),
        ("captions", repeated(["a bird", "a red bird"], None), "text", {"unit": "word", "length": 3}),
        ("motto", [f"w{n % 20}" for n in range(24)], "text", {"unit": "character", "length": 3}),
        ("colour", repeated("red", "green", ""), "categorical", {}),
        ("clip", repeated([0.5, 0.25, 1.0]), "vector", {"size": 3}),
        ("flags", repeated([0, 1], [1, 1]), "binary", {"attributes": ["flags_0", "flags_1"]}),
        ("weight", repeated(1.5, 2.5, float("nan")), "vector", {"size": 1}),
        ("new", repeated(True, False, None), "binary", {"attributes": ["new"]}),
        ("label", repeated(0, 1, 2), "label", {}),
        ("species", repeated("wren", "owl"), "label", {}),
        ("part", repeated("train", "test"), "split", {}),
        ("fold", repeated("train", "val", "test"), "split", {}),
        ("sku", [f"A{n}" for n in range(24)], "skipped", {}),
        ("image_url", repeated("http://a/b.png"), "skipped", {}),
        ("id", repeated(1, 2), "skipped", {}),
        ("number", list(range(24)), "skipped", {}),
        ("nothing", [float("nan")] * 24, "skipped", {}),
        ("blank", ["", " "] * 12, "skipped", {}),
        ("bytes", repeated(b"no picture"), "skipped", {}),
        ("ragged", [[1.0] * (n + 1) for n in range(24)], "skipped", {}),
        ("matrix", repeated([[1.0]]), "skipped", {}),
        (
            "cubes",
            repeated([[[0.5, 1.0], [0.5]]], np.zeros((2, 3, 3)).tolist(), np.zeros((2, 3, 3)).tolist()),
            "image",
            {"channels": 2, "height": 3, "width": 3},
        ),
        ("crooked", repeated([[[0.5, 1.0], [0.5]]]), "skipped", {}),
        ("flat", repeated([[[0.5]]]), "skipped", {}),
        ("hollow", [[], [[[1.0]]]] * 12, "skipped", {}),
    ],
)
def test_what_a_column_is_taken_for(name: str, values: list[Any], role: str, fields: dict[str, Any]) -> None:
    (found,) = guess(table_of({name: values}))
    assert (found.role, found.fields) == (role, fields)


def test_class_numbers_with_names_are_classes() -> None:
    names = datasets.ClassLabel(names=["a", "b"])
    roles = [found.role for found in guess(table_of({"kind": [0, 1], "label": [1, 0]}, kind=names, label=names))]
    assert roles == ["categorical", "label"]


def test_single_numbers_come_together_where_the_same_rows_have_them() -> None:
    table = table_of({"a": repeated(0.5, None, 1.0), "b": repeated(2.0, None, 3.0), "c": repeated(1.0, 2.0, None)})
    found = {guess.columns: (guess.nulls, guess.fields) for guess in guess(table)}
    assert found == {("a", "b"): (8, {"size": 2}), ("c",): (8, {"size": 1})}


def test_names_are_made_fit() -> None:
    columns = ["Photo 1", "photo-1", "7", "id", "Größe", "present"]
    named = name_modalities([Guess((column,), "image", 0, "") for column in columns])
    assert list(named) == ["photo_1", "photo_1_2", "image_7", "image_id", "gr_e", "image_present"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop.parquet")
    return tmp_path / "shop.parquet"


def test_a_draft_is_a_configuration_that_checks(shop: Path) -> None:
    began = run("init", "shop.parquet")
    assert began.exit_code == 0, began.output
    for told in ("160 rows", "photo", "all 16 x 16", "texts of 3 to 3 words", "3 classes", "3 numbers"):
        assert told in began.stdout
    drafted = config_file.read(Path("shop.toml"))
    assert {m.name: m.kind for m in drafted.modalities} == {
        "photo": "image",
        "title": "text",
        "brand": "categorical",
        "measures": "vector",
    }
    nulls = sum(value is None for value in datasets.Dataset.from_parquet(str(shop))["title"])
    assert f"# title: texts of 3 to 3 words; absent in {nulls} rows" in Path("shop.toml").read_text()
    checked = run("check", "shop.toml")
    assert checked.exit_code == 0, checked.output
    for told in ("144 training rows have", "photo + title + brand + measures", "shop.toml is fine"):
        assert told in checked.stdout
    again = run("init", "shop.parquet")
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)


def test_at_most_eight_modalities_are_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {f"v{n}": repeated([0.5, 1.0], [1.5, 2.0]) for n in range(9)}
    table_of({**rows, 'na"me': repeated("a", "b")}).to_parquet("many.parquet")
    assert run("init", "many.parquet").exit_code == 0
    assert "# Left out, 8 modalities are the most: v8, na_me." in Path("many.toml").read_text()
    assert len(config_file.read(Path("many.toml")).modalities) == 8


def hostile(file: Path) -> None:
    """Half of everything is wrong."""
    good = photo("red", 1)
    rows = {
        "photo": [good, good[:60], b"GIF89a", None, b"", good, good, good],
        "features": [[1.0, 2.0], [float("nan"), 1.0], [1.0], None, [float("inf"), 0.0], [2.0, 1.0], [None, 1.0], [3.0, 1.0]],
        "caption": ["a red cup", "x" * 10**6, "", "a red cup", "!!!", None, "a blue cup", "a red cup"],
        "price": [1.0, 2.0, float("nan"), 4.0, None, 6.0, 7.0, 8.0],
        "nothing": [None] * 8,
        "cube": [np.zeros((2, 2, 2)).tolist()] * 5 + [[[[1.0], [0.5, 0.5]]], [], [[[2.0] * 2] * 2] * 2],
        "mixed\nup": ["1", "a b c", "", "12.5 cm wide", None, "x y", "\x00 null", "[red] [/]"],
        "when": [datetime(2024, 1, 1)] * 8,
    }
    datasets.Dataset.from_dict(rows).to_parquet(file)


def test_a_hostile_file_is_told_of_column_by_column_and_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "hostile.parquet")
    began = run("init", "hostile.parquet")
    assert began.exit_code == 0, began.output
    assert "2 of 7 looked at are damaged" in began.stdout
    drafted = Path("hostile.toml").read_text()
    assert "#   nothing: empty" in drafted
    assert "#   when: timestamp[us]: no kind of modality" in drafted
    drafted = re.sub(r"epochs = .*", "epochs = 1", drafted).replace("held_out = 0.1", "held_out = 0.25")
    Path("hostile.toml").write_text(drafted.replace("[network]", "[network]\nfeatures = 8\nwidth = 2\nhidden = 8"))
    checked = run("check", "hostile.toml")
    assert checked.exit_code == 0, checked.output
    told = checked.stdout
    for row, column, reason in (
        (1, "photo", "damaged or cut short"),
        (2, "photo", "the content is GIF"),
        (4, "photo", "not a PNG, JPEG or WebP"),
        (1, "features", "number 0 is not finite"),
        (2, "features", "1 entries, 2 are expected"),
        (4, "features", "number 0 is not finite"),
        (6, "features", "received null"),
        (1, "caption", "1000000 characters, 10000 are allowed"),
        (4, "caption", "has no word"),
        (5, "cube", "nested lists of numbers"),
        (6, "cube", "the shape must be [2, 2, 2], received [0]"),
        (7, "cube", "within [0, 1]"),
    ):
        assert f"row {row}: column {column} holds no {column}: " in told
        assert reason in told
    fitted = run("fit", "hostile.toml")
    assert fitted.exit_code == 0, fitted.output
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for column in ("photo", "features", "caption"):
        assert any(f"column '{column}' holds no {column}" in told and "count as absent" in told for told in warned)
    Path("hostile.toml").write_text(Path("hostile.toml").read_text().replace('"absent"', '"fail"'))
    for command in ("check", "fit"):
        refused = run(command, "hostile.toml")
        assert refused.exit_code == 2
        assert 'bad_values = "absent"' in refused.stderr
        assert refused.exception is None or isinstance(refused.exception, SystemExit)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ({"a": [[1.0, 0.5], None] * 12, "b": [None, [1.0, 0.5]] * 12}, "no training row holds two modalities"),
        ({"a": [[1.0, 0.5]] * 24, "b": [None] * 24}, "1 columns that can be modalities, two are the least"),
        ({"a": [[1.0, 0.5]], "b": [[0.5, 2.0]]}, "has 1 rows, too few to hold some out"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[Any]], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table_of(rows).to_parquet("own.parquet")
    refused = run("init", "own.parquet")
    if refused.exit_code == 0:
        refused = run("check", "own.toml")
        fitted = run("fit", "own.toml")
        assert (fitted.exit_code, told in fitted.stderr) == (2, True), fitted.output
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert isinstance(refused.exception, SystemExit)


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("a,b\n")
    (tmp_path / "own.parquet").write_bytes(b"no Parquet")
    twice = pyarrow.table([pyarrow.array(["a", "b"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    for name, told in (
        ("own.csv", "a .parquet file is expected"),
        ("own.parquet", "cannot be opened"),
        ("twice.parquet", "several columns are named ['a']. Rename"),
        ("absent.parquet", "no such file"),
    ):
        refused = run("init", tmp_path / name, "--out", tmp_path / "own.toml")
        assert (refused.exit_code, told in refused.stderr) == (2, True), refused.output
    assert not (tmp_path / "own.toml").exists()


def test_a_column_of_a_type_that_nobody_reads_is_named(tmp_path: Path) -> None:
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "pairs": pairs}), tmp_path / "own.parquet")
    refused = run("init", tmp_path / "own.parquet", "--out", tmp_path / "own.toml")
    assert refused.exit_code == 2
    assert "column 'pairs' holds map<string, int64 ('pairs')>, which cannot be read. Remove it" in refused.stderr


def test_a_draft_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table_of({"clip": repeated([0.5, 1.0]), "name": repeated("a", "b"), "id": list(range(24))}).to_parquet("own.parquet")
    assert run("init", "own.parquet").exit_code == 0
    text = Path("own.toml").read_text()
    assert "#   id: a number that names the row" in text
    assert tomllib.loads(text)["data"]["sources"][0]["held_out"] == 0.1
