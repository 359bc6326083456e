"""Columns as users have them, from the file through init, check and fit: numbers in any unit, pictures in any form, classes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.training import config_file
from concord.training.cli import app
from concord.training.config import Config, Data, Source
from concord.training.data import dataset
from concord.training.errors import DataError
from tests.support.arrow import columns

pytestmark = pytest.mark.slow
COLUMNS = dict[str, str | tuple[str, ...]]
KIND = CategoricalModality(name="kind")
NUMBER = VectorModality(name="number", size=1)
PHOTO = ImageModality(name="photo", channels=3, height=4, width=6)


def configuration(columns: COLUMNS, *modalities: Modality, source: dict[str, Any] | None = None, **data: Any) -> Config:
    options = source or {"test": "rows.parquet"}
    sources = (Source(train="rows.parquet", columns=columns, licence="CC0", **options),)
    return Config(name="user", modalities=modalities, data=Data(pairing="row", sources=sources, **data))


def load(
    folder: Path, table: dict[str, Any], columns: COLUMNS, *modalities: Modality, split: Any = "train", **options: Any
) -> dataset.Dataset:
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return dataset.load(configuration(columns, *modalities, **options), split, folder)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=2, max_size=6), st.sampled_from(["float64", "float32"]))
def test_any_finite_numbers_train(tmp_path_factory: pytest.TempPathFactory, numbers: list[float], kind: str) -> None:
    with np.errstate(over="ignore"):
        column = np.array(numbers).astype(kind)
    column[~np.isfinite(column)] = 1e38
    table = {"n": column, "kind": ["a", "b"] * 3}
    table["kind"] = table["kind"][: len(column)]
    rows = load(tmp_path_factory.getbasetemp(), table, {"number": "n", "kind": "kind"}, NUMBER, KIND)
    assert rows.columns["number"].present.all()
    assert np.abs(rows.columns["number"].values).max() <= len(column)  # standard deviations


@pytest.mark.parametrize("bad_values", ["fail", "absent"])
def test_statistics_of_large_numbers_are_those_of_the_valid_rows(tmp_path: Path, bad_values: Any) -> None:
    numbers = [1.7e9, 2.4e9, 1e11, 3.5, None]
    bad = [float("inf")] if bad_values == "absent" else []
    table = {"n": [[number] if number else None for number in [*numbers, *bad]], "kind": ["a", "b"] * 3}
    table["kind"] = table["kind"][: len(table["n"])]
    rows = load(tmp_path, table, {"number": "n", "kind": "kind"}, NUMBER, KIND, bad_values=bad_values)
    number = rows.modalities[0]
    assert isinstance(number, VectorModality)
    assert number.mean == pytest.approx([np.mean(numbers[:4])], rel=1e-12)  # type: ignore[arg-type]
    assert number.std == pytest.approx([np.std(numbers[:4])], rel=1e-12)  # type: ignore[arg-type]
    assert rows.columns["number"].present.tolist()[:5] == [True] * 4 + [False]


def test_float64_statistics_do_not_lose_seconds(tmp_path: Path) -> None:
    """Unix seconds of one minute differ by less than float32 can hold."""
    seconds = 1.7e9 + np.arange(60.0)
    rows = load(tmp_path, {"n": seconds, "kind": ["a", "b"] * 30}, {"number": "n", "kind": "kind"}, NUMBER, KIND)
    values = rows.columns["number"].values[:, 0]
    np.testing.assert_allclose(values, (np.arange(60) - 29.5) / np.std(np.arange(60)), rtol=1e-6)


@pytest.mark.usefixtures("folder")
def test_check_and_fit_agree_on_large_numbers() -> None:
    generator = np.random.default_rng(0)
    table = {"income": generator.choice([1e3, 1e11], 40), "seconds": 1.7e9 + generator.random(40), "kind": ["a", "b"] * 20}
    pq.write_table(pa.table(table), "rows.parquet")
    assert run("init", "rows.parquet").exit_code == 0
    Path("rows.toml").write_text(Path("rows.toml").read_text().replace('"absent"', '"fail"'))
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output
    rows = dataset.load(config_file.read(Path("rows.toml")), "train")  # as fit does
    assert rows.columns["numbers"].present.all()


def test_whole_floats_are_classes_and_labels(folder: Path) -> None:
    codes = [1.0, 2.0, None, float("nan"), 1.0, 3.0] * 4
    table = {"code": pa.array(codes), "label": pa.array(codes), "n": np.random.default_rng(0).random(24)}
    rows = load(folder, table, {"kind": "code", "number": "n"}, KIND, NUMBER, source={"test": "rows.parquet", "label": "label"})
    kind = rows.modalities[0]
    assert isinstance(kind, CategoricalModality)
    assert kind.classes == ("1", "2", "3")
    batch = next(rows.batches(0, 6, 0, shuffle=False))
    assert batch.present[:, 0].tolist() == [True, True, False, False, True, True]
    assert batch.arrays["kind"][:, 0].tolist() == [0, 1, 0, 0, 0, 2]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 2, -1, -1, 1, 3]
    assert run("init", "rows.parquet").exit_code == 0
    assert config_file.read(Path("rows.toml")).data.sources[0].label == "label"


def test_pandas_categories_and_integers_with_a_gap_are_read(folder: Path) -> None:
    import pandas  # noqa: PLC0415 - comes with datasets

    brands = pandas.Categorical(["x", "y", None, "x"], categories=["x", "y", "z"])
    frame = pandas.DataFrame({"brand": brands, "code": [1, None, 2, 1]})
    frame["n"] = [1.0, 2.0, 3.0, None]
    frame.to_parquet("rows.parquet")
    columns: COLUMNS = {"brand": "brand", "kind": "code", "number": "n"}
    brand = CategoricalModality(name="brand")
    rows = dataset.load(configuration(columns, brand, KIND, NUMBER), "train", folder)
    assert [modality.classes for modality in rows.modalities[:2]] == [("x", "y"), ("1", "2")]  # type: ignore[union-attr]
    assert [rows.columns[name].present.tolist() for name in columns] == [
        [True, True, False, True],
        [True, False, True, True],
        [True, True, True, False],
    ]


@given(column=columns(rows=24))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_column_of_any_arrow_type_is_inferred_or_skipped(folder: Path, column: pa.Array) -> None:
    """A column of the draft can be read as what it was inferred to be."""
    table = pa.table({"any": column, "n": np.random.default_rng(0).random(24), "kind": ["a", "b"] * 12})
    try:
        pq.write_table(table, "rows.parquet")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        assume(False)
    Path("rows.toml").unlink(missing_ok=True)
    result = run("init", "rows.parquet")
    assert result.exit_code == 0, result.output
    config = config_file.read(Path("rows.toml"))
    source = config.data.sources[0].model_copy(update={"held_out": None, "test": "rows.parquet"})
    whole = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    rows = dataset.load(whole, "train", folder)
    for modality in rows.modalities:
        assert rows.columns[modality.name].present.any()


def class_label(column: list[int | None], names: list[str]) -> tuple[pa.Array, dict[str, str]]:
    import json  # noqa: PLC0415

    metadata = {"huggingface": json.dumps({"info": {"features": {"kind": {"names": names, "_type": "ClassLabel"}}}})}
    return pa.array(column), metadata


def test_classes_are_those_of_the_training_rows(folder: Path) -> None:
    column, metadata = class_label([3, 0, 3, 0, None, 1, 3, 1], ["cap", "boot", "never", "shoe"])
    table = {"kind": column, "n": np.arange(8.0) ** 2, "part": ["train"] * 5 + ["test"] * 3}
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), "rows.parquet")
    config = configuration({"kind": "kind", "number": "n"}, KIND, NUMBER, source={"split": "part"})
    train, test = (dataset.load(config, split, folder) for split in ("train", "test"))
    for rows in (train, test):
        assert rows.modalities[0].classes == ("cap", "shoe")  # type: ignore[union-attr]
    assert train.columns["kind"].values[:, 0].tolist() == [1, 0, 1, 0, 0]
    assert test.columns["kind"].present.tolist() == [False, True, False]
    assert (test.columns["kind"].errors, dict(test.columns["kind"].unseen)) == ([], {"boot": 2})
    assert train.notes == ["kind: 2 of its 4 classes are in no training row: boot, never"]
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), "rows.parquet")
    Path("rows.toml").write_text(
        'name = "user"\n[[modalities]]\nname = "kind"\nkind = "categorical"\n[[modalities]]\nname = "number"\nkind = "vector"\n'
        'size = 1\n[data]\nfolder = "."\npairing = "row"\n[[data.sources]]\ntrain = "rows.parquet"\nsplit = "part"\n'
        'columns = { kind = "kind", number = "n" }\nlicence = "CC0"\n'
    )
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output
    assert "kind: 2 of its 4 classes are in no training row: boot, never" in checked.output
    assert "test: 2 rows have a class of kind that no training row has, which counts as absent: 'boot' (2)" in checked.output


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 4, 6, 3))
SCANS = np.random.default_rng(0).integers(0, 256, (24, 5, 7, 4))


@pytest.mark.parametrize("scale", ["0 to 255", "0 to 1"])
@pytest.mark.parametrize("order", ["height x width x channels", "channels x height x width"])
def test_nested_lists_are_read_alike_by_init_check_and_fit(folder: Path, order: str, scale: str) -> None:
    white = int(scale[5:])
    table: dict[str, Any] = {}
    for name, pixels in (("photo", PIXELS), ("scan", SCANS)):
        axes = pixels if order.endswith("channels") else pixels.transpose(0, 3, 1, 2)
        table[name] = pa.array([None if row == 3 else (axes[row] / 255 * white).tolist() for row in range(24)])
    pq.write_table(pa.table(table), "rows.parquet")
    result = run("init", "rows.parquet")
    shapes = ("4 x 6 x 3", "5 x 7 x 4") if order.endswith("channels") else ("3 x 4 x 6", "4 x 5 x 7")
    notes = [f"lists of {shape} numbers, read as {order}, from 0 (black) to {white} (white)" for shape in shapes]
    text = Path("rows.toml").read_text()
    assert all(note in result.stdout and note in text for note in notes)
    config = config_file.read(Path("rows.toml"))
    assert [modality.shape for modality in config.modalities] == [(3, 4, 6), (4, 5, 7)]
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output
    assert all(f"{name}: {note}" in checked.stdout for name, note in zip(("photo", "scan"), notes, strict=True))
    source = config.data.sources[0].model_copy(update={"held_out": None, "test": "rows.parquet"})
    whole = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    rows = dataset.load(whole, "train", folder)
    batch = next(rows.batches(0, 23, 0, shuffle=False))
    present = [row for row in range(24) if row != 3]
    for name, pixels in (("photo", PIXELS), ("scan", SCANS)):
        np.testing.assert_allclose(batch.arrays[name].numpy(), pixels[present].transpose(0, 3, 1, 2) / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["[2026] shop", "a*b?", "写真 100% #1", "{a,b}"])
def test_relative_file_in_a_folder_of_any_name_is_trained_on(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The name of the working directory is no pattern."""
    (folder / name / "data").mkdir(parents=True)
    monkeypatch.chdir(folder / name)
    numbers = np.random.default_rng(0).normal(size=24)
    pq.write_table(pa.table({"n": numbers, "kind": ["a", "b"] * 12}), f"data/{name}.parquet")
    assert run("init", f"data/{name}.parquet", "--out", "rows.toml").exit_code == 0
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output
    config = config_file.read(Path("rows.toml"))
    assert len(dataset.load(config, "train")) + len(dataset.load(config, "test")) == 24
    (folder / name / "data" / f"{name}.parquet").rename("rows.parquet")
    assert run("check", "rows.toml").exit_code == 2


def test_nested_lists_in_another_range_say_what_to_do(folder: Path) -> None:
    lists = [(PIXELS[row] / 127.5 - 1).tolist() for row in range(24)]
    pq.write_table(
        pa.table({"photo": lists, "n": np.random.default_rng(0).random(24), "kind": ["a", "b"] * 12}), "rows.parquet"
    )
    result = run("init", "rows.parquet")
    assert "nested lists of numbers from -1 to 1: pictures have numbers in [0, 1], or from 0 (black)" in result.stdout
    with pytest.raises(DataError, match=r"no training row has photo; .*24 not readable; row 0: values .*\[0, 1\], received -1"):
        dataset.load(configuration({"photo": "photo", "kind": "kind"}, PHOTO, KIND, bad_values="absent"), "train", folder)


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (6, 4), level).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("as_struct", [True, False])
def test_picture_paths_start_at_the_data_folder_then_at_the_file(folder: Path, as_struct: bool) -> None:
    name = "写真 #1%.png"
    for place, file, level in (("data", name, 10), ("data/tables", name, 99), ("data/tables", "b/2.png", 20)):
        (folder / place / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / place / file).write_bytes(png(level))
    paths = [name, "b/2.png"] * 12
    column = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
    pq.write_table(pa.table({"picture": column, "kind": ["a", "b"] * 12}), "data/tables/rows.parquet")
    result = run("init", "data/tables/rows.parquet")
    assert "images, all 4 x 6" in result.stdout
    text = Path("rows.toml").read_text()
    text = text.replace('folder = "data/tables"', f'folder = "{folder}/data"').replace(
        '"rows.parquet"', '"tables/rows.parquet"'
    )
    Path("rows.toml").write_text(text.replace("\n", "\r\n"), newline="")  # as Windows editors write it
    checked = run("check", "rows.toml")
    assert checked.exit_code == 0, checked.output
    rows = dataset.load(config_file.read(Path("rows.toml")), "train", folder / "data")
    levels = np.unique(rows.columns["picture"].values.max(axis=(1, 2, 3)))
    assert levels.tolist() == [10, 20]
    moved = run("check", "rows.toml", "--data", folder / "data" / "tables")
    assert moved.exit_code == 2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["check", "fit"])
def test_error_of_no_training_row_has_the_reasons(command: str) -> None:
    pictures = [None, {"bytes": None, "path": "gone/1.png"}, {"bytes": b"GIF89a", "path": None}, *[None] * 21]
    pq.write_table(pa.table({"photo": pictures, "kind": ["a", "b"] * 12}), "rows.parquet")
    Path("rows.toml").write_text(
        'name = "user"\n[[modalities]]\nname = "photo"\nkind = "image"\nchannels = 1\nheight = 4\nwidth = 4\n[[modalities]]\n'
        'name = "kind"\nkind = "categorical"\n[data]\nfolder = "."\npairing = "row"\nbad_values = "absent"\n[[data.sources]]\n'
        'train = "rows.parquet"\ntest = "rows.parquet"\ncolumns = { photo = "photo", kind = "kind" }\nlicence = "CC0"\n'
    )
    result = run(command, "rows.toml")
    assert result.exit_code == 2
    reasons = ("22 null, 2 not readable", "row 1: no such file: 'gone/1.png'", "row 2: the content is GIF")
    for part in ("no training row has photo", *reasons):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("modality", "column", "reason"),
    [
        (KIND, pa.array([None, " ", ""] * 8), r"no training row has m; column m, values: 8 null, 16 blank\. Set its classes"),
        (TextModality(name="m", length=3), pa.array([1, None] * 12), r"12 null, 12 not readable; row 0: a text is a string"),
        (NUMBER, pa.array(["x", None] * 12), r"12 null, 12 not readable; row 0: a vector holds numbers; received a string"),
        (NUMBER, pa.array([[1.0, 2.0], None] * 12), r"row 0: the list has 2 entries, 1 are expected"),
    ],
)
def test_error_of_nothing_to_learn_from_has_the_reasons(tmp_path: Path, modality: Modality, column: Any, reason: str) -> None:
    flags = BinaryModality(name="flags", attributes=("a",))
    named = modality.model_copy(update={"name": "m"})
    with pytest.raises(DataError, match=reason):
        load(tmp_path, {"m": column, "flags": [True, False] * 12}, {"m": "m", "flags": "flags"}, named, flags)
