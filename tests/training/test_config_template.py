"""From a Parquet file to a configuration: inferred schemas, the rendered template, reports of bad values, and rejections."""

import io
import os
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

from concord.model.modality import MAX_MODALITIES
from concord.training import config_file
from concord.training.cli import app
from concord.training.config_template import name_modalities
from concord.training.data.infer_schema import ColumnSchema, infer_schema, limit_modalities, propose_encoders
from concord.training.data.tables import HubTable, RawTable
from tests.support.shop import photo, write_shop


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def table_of(rows: dict[str, list[Any]], **features: Any) -> datasets.Dataset:
    table = datasets.Dataset.from_dict(rows)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    return table


def raw(table: datasets.Dataset) -> RawTable:
    return HubTable(table, "rows")


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
        ("large", repeated(np.zeros((130, 9, 3)).tolist()), "image", {"channels": 3, "height": 64, "width": 64}),
        ("plane", repeated(np.eye(9, 8).tolist()), "image", {"channels": 1, "height": 9, "width": 8}),
        ("series", repeated(np.full((9, 8), -1.0).tolist()), "skipped", {}),
        ("title", [f"cup number {n}" for n in range(24)], "text", {"unit": "word", "length": 3}),
        ("story", [f"{n} " + "word " * 98 for n in range(24)], "text", {"unit": "word", "length": 32, "too_long": "cut"}),
        ("captions", repeated(["a bird", "a red bird"], None), "text", {"unit": "word", "length": 3}),
        ("motto", [f"w{n % 20}" for n in range(24)], "text", {"unit": "character", "length": 3}),
        ("colour", repeated("red", "green", ""), "categorical", {}),
        ("clip", repeated([0.5, 0.25, 1.0]), "vector", {"size": 3}),
        ("flags", repeated([0, 1], [1, 1]), "binary", {"attributes": ["flags_0", "flags_1"]}),
        ("gaps", repeated([0.5, None], [float("nan"), 1.0]), "skipped", {}),
        ("gaps", repeated([None, None]), "skipped", {}),
        ("weight", repeated(1.5, 2.5, float("nan")), "vector", {"size": 1}),
        ("new", repeated(True, False, None), "binary", {"attributes": ["new"]}),
        ("label", repeated(0, 1, 2), "label", {}),
        ("label", repeated(0.0, 1.0, None), "label", {}),
        ("label", repeated(0.5, 1.0, None), "vector", {"size": 1}),
        ("target", repeated(True, False), "label", {}),
        ("species", repeated("wren", "owl"), "label", {}),
        ("part", repeated("train", "test"), "split", {}),
        ("fold", repeated("train", "val", "test"), "split", {}),
        ("fold", repeated("train"), "skipped", {}),
        ("fold", repeated("test"), "skipped", {}),
        ("kind", repeated("train", "validation"), "split", {}),
        ("kind", repeated("train", "bus", "car"), "categorical", {}),
        ("motto", repeated("the same"), "skipped", {}),
        ("count", repeated(3, None), "skipped", {}),
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
            repeated([[[0.5, 1.0], [0.5]]], np.zeros((2, 5, 6)).tolist(), np.zeros((2, 5, 6)).tolist()),
            "image",
            {"channels": 2, "height": 5, "width": 6},
        ),
        ("crooked", repeated([[[0.5, 1.0], [0.5]]]), "skipped", {}),
        ("flat", repeated([[[0.5]]]), "skipped", {}),
        ("hollow", [[], [[[1.0]]]] * 12, "skipped", {}),
    ],
)
def test_schema_of_a_column(name: str, values: list[Any], role: str, fields: dict[str, Any]) -> None:
    (schema,) = infer_schema(raw(table_of({name: values})))
    assert (schema.role, schema.fields) == (role, fields)


def test_lists_with_gaps_are_counted() -> None:
    (schema,) = infer_schema(raw(table_of({"v": repeated([0.5, 1.0], [1.5, None], [float("nan"), 1.0], [0.5])})))
    assert (schema.role, schema.fields) == ("vector", {"size": 2})
    assert schema.note == "2 numbers, 6 rows have a different length, 12 rows have a null or NaN in the list"


def test_class_label_columns_are_categorical_or_label() -> None:
    names = datasets.ClassLabel(names=["a", "b"])
    roles = [schema.role for schema in infer_schema(raw(table_of({"kind": [0, 1], "label": [1, 0]}, kind=names, label=names)))]
    assert roles == ["categorical", "label"]


def test_number_columns_with_the_same_missing_rows_form_one_vector() -> None:
    table = table_of({"a": repeated(0.5, None, 1.0), "b": repeated(2.0, None, 3.0), "c": repeated(1.0, 2.0, None)})
    schemas = {schema.columns: (schema.nulls, schema.fields) for schema in infer_schema(raw(table))}
    assert schemas == {("a", "b"): (8, {"size": 2}), ("c",): (8, {"size": 1})}


def test_modality_names_are_valid_and_unique() -> None:
    columns = ["Photo 1", "photo-1", "7", "id", "Größe", "present"]
    named = name_modalities([ColumnSchema((column,), "image", 0, "") for column in columns])
    assert list(named) == ["photo_1", "photo_1_2", "image_7", "image_id", "grosse", "image_present"]


def test_split_without_test_rows_is_named_and_rows_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = {"split": ["train"] * 24, "brand": repeated("a", "b"), "n": repeated([0.5, 1.0], [1.5, 1.0])}
    table_of(table).to_parquet("rows.parquet")
    result = run("init", "rows.parquet")
    note = "a split without test rows (each row says train): rows are held out instead"
    for place in (result.stdout, Path("rows.toml").read_text()):
        assert note in place
    (source,) = config_file.read(Path("rows.toml")).data.sources
    assert (source.split, source.held_out, list(source.columns)) == (None, 0.1, ["brand", "n"])


def test_determined_columns_are_named_and_left_out_before_others() -> None:
    generator = np.random.default_rng(0)
    article = generator.integers(0, 12, 600)
    table = {
        "category": [f"category {a // 6}" for a in article],  # follows from family and from article
        "family": [f"family {a // 3}" for a in article],
        "article": [f"article {a}" for a in article],
        "twin": [f"twin {11 - a}" for a in article],
        "usage": [f"usage {u}" for u in generator.integers(0, 3, 600)],
        "year": generator.integers(2007, 2020, 600).tolist(),
    }
    rows = raw(table_of(table))
    schemas = infer_schema(rows)
    notes = {schema.columns[0]: schema.note for schema in limit_modalities(rows, schemas, 6)}
    assert notes == {
        "category": "2 classes; family determines it",
        "family": "4 classes; article determines it",
        "article": "12 classes",
        "twin": "12 classes; article determines it",
        "usage": "3 classes",
        "year": "single values",
    }
    limited = {schema.columns[0]: schema for schema in limit_modalities(rows, schemas, 3)}
    assert [name for name, schema in limited.items() if schema.role != "skipped"] == ["article", "usage", "year"]
    assert limited["category"].note == "left out: article determines it (2 classes)"
    (kept,) = [schema for schema in limit_modalities(rows, schemas, 1) if schema.role != "skipped"]
    assert kept.columns == ("article",)


def test_columns_of_independent_classes_are_not_determined() -> None:
    generator = np.random.default_rng(0)
    table = {f"c{index}": [f"k{k}" for k in generator.integers(0, 9, 300)] for index in range(3)}
    table["sku"] = [f"the sku {row // 2}" for row in range(300)]  # almost as many as rows: it would determine every column
    rows = raw(table_of(table))
    assert not [schema for schema in limit_modalities(rows, infer_schema(rows), 8) if "determines" in schema.note]


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("flags\t: fpu avx2 avx512_bf16", "bfloat16"),
        ("Features\t: fp bf16", "bfloat16"),
        ("flags\t: fpu avx512f", "float32"),
        (None, "float32"),
    ],
)
def test_precision_of_the_template_is_that_of_the_processor(
    shop: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    processor = shop.with_name("cpuinfo")
    if flags is not None:
        processor.write_text(f"processor\t: 0\n{flags} amx\n")
    monkeypatch.setattr("concord.training.machine._PROCESSOR", processor)
    assert run("init", "shop.parquet").exit_code == 0
    assert config_file.read(Path("shop.toml")).precision == precision
    (line,) = [line for line in Path("shop.toml").read_text().splitlines() if line.startswith("precision")]
    assert "faster" in line


def test_template_leaves_the_threads_to_the_environment(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("init", shop.name).exit_code == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert config_file.read(Path("shop.toml")).thread_count == 3
    assert f"# threads = {len(os.sched_getaffinity(0))} " in Path("shop.toml").read_text()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_shop(tmp_path / "shop.parquet")
    return tmp_path / "shop.parquet"


def test_init_writes_a_configuration_that_passes_check(shop: Path) -> None:
    result = run("init", "shop.parquet")
    assert result.exit_code == 0, result.output
    for text in ("160 rows", "photo", "all 16 x 16", "texts of 3 words", "3 classes", "3 numbers"):
        assert text in result.stdout
    assert {m.name: m.kind for m in config_file.read(Path("shop.toml")).modalities} == {
        "photo": "image",
        "title": "text",
        "brand": "categorical",
        "measures": "vector",
    }
    nulls = sum(value is None for value in datasets.Dataset.from_parquet(str(shop))["title"])
    text = Path("shop.toml").read_text()
    assert f"# title: texts of 3 words; absent in {nulls} rows" in text
    assert "length = 3  # maximum number of words; longer texts are rejected" in text
    checked = run("check", "shop.toml")
    assert checked.exit_code == 0, checked.output
    for text in ("modalities of 144 training rows", "photo + title + brand + measures", "shop.toml is valid"):
        assert text in checked.stdout
    again = run("init", "shop.parquet")
    assert (again.exit_code, "already exists" in again.stderr) == (2, True)


def test_template_uses_at_most_twelve_modalities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {f"v{n}": repeated([0.5, 1.0], [1.5, 2.0]) for n in range(13)}
    table_of({**rows, 'na"me': repeated("a", "b")}).to_parquet("many.parquet")
    result = run("init", "many.parquet")
    assert result.exit_code == 0
    for place in (result.stdout, Path("many.toml").read_text()):
        for name, note in (("v12", "2 numbers"), ('na"me', "2 classes")):
            assert re.search(f"{name}.*left out: 12 modalities are the maximum \\({note}\\)", place)
    assert len(config_file.read(Path("many.toml")).modalities) == MAX_MODALITIES == 12


@pytest.mark.parametrize(
    ("columns", "encoders", "dropout"),
    [
        ({"photo": [[float(n)] * 200 for n in range(24)], "parts": repeated([0, 1], [1, 1])}, "shallow", 0.5),
        ({"photo": [[float(n)] * 200 for n in range(24)], "title": [f"cup number {n}" for n in range(24)]}, "deep", 0.25),
        ({"sizes": [[float(n)] * 2 for n in range(24)], "kind": repeated("cup", "bowl")}, "deep", 0.25),
    ],
)
def test_template_has_contrastive_learning_and_shallow_encoders_for_frozen_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[Any]], encoders: str, dropout: float
) -> None:
    monkeypatch.chdir(tmp_path)
    table_of(columns).to_parquet("rows.parquet")
    assert run("init", "rows.parquet").exit_code == 0
    settings = config_file.read(Path("rows.toml"))
    assert (settings.contrast.epochs, settings.contrast.batch_size) == (120, 8)
    assert settings.align.contrast_weight > 0
    assert settings.contrast.prediction > 0
    assert settings.contrast.multimodal_weight > 0
    assert settings.objective.weights == "information"
    assert (settings.network.encoders, settings.contrast.dropout) == (encoders, dropout)


def write_bad_rows(file: Path) -> None:
    """Write a file in which half of the values are invalid."""
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


def test_bad_values_are_reported_by_row_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bad_rows(tmp_path / "bad.parquet")
    result = run("init", "bad.parquet")
    assert result.exit_code == 0, result.output
    assert "2 of 7 sampled images are damaged" in result.stdout
    template = Path("bad.toml").read_text()
    assert "#   nothing: empty" in template
    assert "#   when: unsupported type timestamp[us]" in template
    template = re.sub(r"epochs = .*", "epochs = 1", template).replace("held_out = 0.1", "held_out = 0.25")
    Path("bad.toml").write_text(template.replace("[network]", "[network]\nfeatures = 8\nwidth = 2\nhidden = 8"))
    checked = run("check", "bad.toml")
    assert checked.exit_code == 0, checked.output
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
        assert f"row {row}, column {column}: invalid {column}: " in checked.stdout
        assert reason in checked.stdout
    fitted = run("fit", "bad.toml")
    assert fitted.exit_code == 0, fitted.output
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for column in ("photo", "features", "caption"):
        assert any(f"column '{column}': invalid {column}" in text and "treated as absent" in text for text in warnings)
    Path("bad.toml").write_text(Path("bad.toml").read_text().replace('"absent"', '"fail"'))
    for command in ("check", "fit"):
        rejected = run(command, "bad.toml")
        assert rejected.exit_code == 2
        assert 'bad_values = "absent"' in rejected.stderr
        assert rejected.exception is None or isinstance(rejected.exception, SystemExit)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": [[1.0, 0.5], None] * 12, "b": [None, [1.0, 0.5]] * 12}, "no training row has two modalities"),
        ({"a": [[1.0, 0.5]] * 24, "b": [None] * 24}, "1 columns that can be modalities, at least two are needed"),
        ({"a": [[1.0, 0.5]], "b": [[0.5, 2.0]]}, "1 rows are too few for held_out"),
    ],
)
def test_file_that_cannot_be_trained_on_is_rejected_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[Any]], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table_of(rows).to_parquet("rows.parquet")
    rejected = run("init", "rows.parquet")
    if rejected.exit_code == 0:
        rejected = run("check", "rows.toml")
        fitted = run("fit", "rows.toml")
        assert (fitted.exit_code, message in fitted.stderr) == (2, True), fitted.output
    assert rejected.exit_code == 2
    assert message in rejected.stderr
    assert isinstance(rejected.exception, SystemExit)


def test_file_without_a_readable_table_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "rows.parquet").write_bytes(b"no Parquet")
    twice = pyarrow.table([pyarrow.array(["a", "b"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    for name, message in (
        ("rows.csv", "a Parquet file is expected, which ends in .parquet or .pq"),
        ("rows.parquet", "cannot be opened"),
        ("twice.parquet", "more than one column is named ['a']. Rename"),
        ("absent.parquet", "no such file"),
    ):
        rejected = run("init", tmp_path / name, "--out", tmp_path / "rows.toml")
        assert (rejected.exit_code, message in rejected.stderr) == (2, True), rejected.output
    assert not (tmp_path / "rows.toml").exists()


def test_column_of_an_unsupported_type_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = pyarrow.array([[("a", 1)]] * 24, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    columns = {"title": [f"cup {n}" for n in range(24)], "clip": repeated([0.5, 1.0], [1.5, 1.0]), "pairs": pairs}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    result = run("init", "rows.parquet")
    assert result.exit_code == 0, result.output
    assert "pairs" in result.stdout
    assert "#   pairs: unsupported type map<string, int64 ('pairs')>" in Path("rows.toml").read_text()
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output


def test_template_lists_unused_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table_of({"clip": repeated([0.5, 1.0]), "name": repeated("a", "b"), "id": list(range(24))}).to_parquet("rows.parquet")
    assert run("init", "rows.parquet").exit_code == 0
    text = Path("rows.toml").read_text()
    assert "#   id: row identifiers (numbers)" in text
    assert tomllib.loads(text)["data"]["sources"][0]["held_out"] == 0.1


@pytest.mark.parametrize(
    ("values", "kind", "is_proposed"),
    [
        (repeated(png("RGB", (64, 48)), png("RGB", (640, 480))), "image", True),
        (repeated(png("RGB", (32, 32))), "image", False),
        (repeated(png("L", (200, 200))), "image", False),
        (repeated("a small red bird", "two dogs run in snow"), "text", True),
        (repeated(["a small red bird", "the bird is red"], None), "text", True),
        (repeated("plain red cup", "new blue chair", "old lamp"), "text", False),
    ],
)
def test_encoder_is_proposed_for_photographs_and_sentences(values: list[Any], kind: str, is_proposed: bool) -> None:
    schemas = infer_schema(raw(table_of({"value": values, "number": list(range(0, 2 * len(values), 2))})))
    (schema,) = (found for found in propose_encoders(schemas, {"image": "e", "text": "e"}) if found.columns == ("value",))
    cut = {"too_long": "cut"} if kind == "text" else {}
    assert (schema.fields == {"encoder": "e", **cut}) == is_proposed
    (without,) = (found for found in propose_encoders(schemas, {}) if found.columns == ("value",))
    assert "encoder" not in without.fields
