"""A run knows its data: it records what was read, and continues with the same data only."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from concord.model.bundle.manifest import DataSource
from concord.model.modality import CategoricalModality, TextModality, VectorModality
from concord.training import config_file
from concord.training.checkpoint import Run
from concord.training.cli import app
from concord.training.data import dataset
from concord.training.errors import DataError, RunError
from concord.training.export import ExportInputs
from concord.training.run_data import RunData, keep_run_data

WORDS = ["red", "green", "blue", "black"]
MODALITIES = (
    TextModality(name="title", unit="word", length=4, vocabulary=("red", "cup")),
    VectorModality(name="size", size=1, mean=(1.5,), std=(2.0,)),
    CategoricalModality(name="brand", classes=("acme", "zenith")),
)
SOURCE = DataSource(file="shop.parquet", sha256="0" * 64, rows=10, licence="mine")


def write_rows(file: Path, words: list[str], rows: int = 48) -> None:
    """Write rows with a text and a vector. Files of different words of one length have the same size."""
    generator = np.random.default_rng(0)
    table = pyarrow.table(
        {
            "title": [words[row % len(words)] for row in range(rows)],
            "size": [generator.normal(size=2).tolist() for _ in range(rows)],
        }
    )
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A configuration of generated rows. Vocabulary, mean and deviation are learned."""
    write_rows(tmp_path / "shop.parquet", WORDS)
    stages = "".join(f"[{name}]\nepochs = 1\nbatch_size = 16\n" for name in ("joint", "refiner", "align"))
    config = tmp_path / "shop.toml"
    config.write_text(
        f"""
name = "shop"
threads = 1
[[modalities]]
name = "title"
kind = "text"
unit = "word"
length = 2
[[modalities]]
name = "size"
kind = "vector"
size = 2
[data]
folder = "{tmp_path}"
pairing = "row"
[[data.sources]]
train = "shop.parquet"
held_out = 0.25
columns = {{ title = "title", size = "size" }}
licence = "mine"
[network]
latent = 4
features = 8
width = 2
hidden = 8
{stages}"""
    )
    return config


def run_command(command: str, config: Path, *options: str) -> Any:
    return CliRunner().invoke(app, [command, str(config), "--out", str(config.parent / "run"), *options])


@pytest.fixture
def fitted(shop: Path) -> Path:
    result = run_command("fit", shop)
    assert result.exit_code == 0, result.output
    return shop


def recorded(config: Path) -> RunData:
    return RunData.from_json(json.loads((config.parent / "run" / "data.json").read_text()))


def test_run_records_the_hash_of_every_source_and_the_learned_statistics(fitted: Path) -> None:
    digest = hashlib.sha256((fitted.parent / "shop.parquet").read_bytes()).hexdigest()
    data = recorded(fitted)
    assert [(source.file, source.sha256, source.rows) for source in data.sources] == [
        ("shop.parquet", digest, 36),
        ("shop.parquet", digest, 12),
    ]
    title, size = data.modalities
    assert isinstance(title, TextModality)
    assert isinstance(size, VectorModality)
    assert sorted(title.vocabulary) == sorted(WORDS)
    assert size.mean is not None
    assert size.std is not None


def replace_words(config: Path, *, move: bool) -> None:
    """Replace the file by one with other words, of the same size and with the same modification time."""
    file = config.parent / "shop.parquet"
    before = file.stat()
    new = config.parent / "new.parquet"
    write_rows(new, ["tan", "khaki", "gold", "ivory"])
    assert new.stat().st_size == before.st_size
    if move:
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        new.replace(file)
    else:
        file.write_bytes(new.read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("move", [True, False], ids=["moved over it", "written in place"])
@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_run_does_not_continue_with_other_data_of_the_same_size_and_time(fitted: Path, command: str, move: bool) -> None:
    before = {file: file.read_bytes() for file in (fitted.parent / "run").iterdir() if file.name != "lock"}
    replace_words(fitted, move=move)
    result = run_command(command, fitted)
    assert result.exit_code == 2
    assert "holds a run with other data: shop.parquet has sha256 " in result.stderr
    assert "title has a different vocabulary" in result.stderr
    assert "Restore the data, name another folder with --out, or start over with --fresh" in result.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_fresh_run_trains_on_the_new_data_and_names_it(fitted: Path) -> None:
    replace_words(fitted, move=True)
    result = run_command("fit", fitted, "--fresh")
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256((fitted.parent / "shop.parquet").read_bytes()).hexdigest()
    inputs = ExportInputs.read(Run(fitted.parent / "run", config_file.read(fitted)))  # the provenance of the bundle
    assert inputs is not None
    for data in (recorded(fitted), inputs):
        assert {source.sha256 for source in data.sources} == {digest}
        title = data.modalities[0]
        assert isinstance(title, TextModality)
        assert sorted(title.vocabulary) == ["gold", "ivory", "khaki", "tan"]


def test_restored_data_continues_the_run(fitted: Path) -> None:
    content = (fitted.parent / "shop.parquet").read_bytes()
    replace_words(fitted, move=False)
    assert run_command("fit", fitted).exit_code == 2
    (fitted.parent / "shop.parquet").write_bytes(content)
    result = run_command("fit", fitted)
    assert result.exit_code == 0, result.output


def test_export_from_data_rejects_other_data(fitted: Path) -> None:
    (fitted.parent / "run" / "export.npz").unlink()
    replace_words(fitted, move=True)
    result = run_command("export", fitted)
    assert result.exit_code == 2
    assert "holds a run with other data" in result.stderr
    assert not (fitted.parent / "run" / "bundle").exists()


def test_checkpoint_of_other_shapes_is_rejected_without_a_record_of_the_data(fitted: Path) -> None:
    """Runs that began with version 0.1 have no data.json."""
    (fitted.parent / "run" / "data.json").unlink()
    write_rows(fitted.parent / "shop.parquet", [*WORDS, "white", "brown"])
    result = run_command("fit", fitted)
    assert result.exit_code == 2
    assert "its checkpoint has weights of other shapes than the model of this configuration and data" in result.stderr


def test_run_without_a_record_of_its_data_continues_with_a_warning(fitted: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fitted.parent / "run" / "data.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert run_command("fit", fitted).exit_code == 0
    assert "began before version 0.2, which records the data of a run. It is assumed to be unchanged" in caplog.text
    caplog.clear()
    assert run_command("fit", fitted).exit_code == 0
    assert "began before version 0.2" not in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"modalities": [], "sources": 3}'])
def test_damaged_record_of_the_data_is_rejected(make_config: Any, tmp_path: Path, content: str) -> None:
    run = Run(tmp_path, make_config())
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(RunError, match=r"data\.json: damaged .*--fresh"):
        keep_run_data(run, RunData(MODALITIES, (SOURCE,)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m, s: (m, (s.model_copy(update={"sha256": "1" * 64}),)), "shop.parquet has sha256 111111111111, and had 0000"),
        (lambda m, s: (m, (s.model_copy(update={"rows": 9}),)), "shop.parquet has 9 rows of this split, and had 10"),
        (lambda m, s: (m, (s.model_copy(update={"file": "b.parquet"}),)), "the source is b.parquet, and was shop.parquet"),
        (lambda m, s: ((m[0].model_copy(update={"vocabulary": ("red",)}), *m[1:]), (s,)), "title has a different vocabulary"),
        (lambda m, s: ((m[0], m[1].model_copy(update={"mean": (1.6,)}), m[2]), (s,)), "size has a different mean"),
        (lambda m, s: ((*m[:2], m[2].model_copy(update={"classes": ("acme", "none")})), (s,)), "brand has a different classes"),
    ],
)
def test_differences_name_the_source_or_the_statistic(change: Callable[..., Any], expected: str) -> None:
    before = RunData(MODALITIES, (SOURCE,))
    (difference,) = RunData(*change(MODALITIES, SOURCE)).differences(before)
    assert expected in difference
    assert not before.differences(before)


@given(
    st.lists(st.tuples(st.text(), st.text(max_size=3), st.integers(0, 1 << 62)), min_size=1, max_size=3),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_record_of_the_data_reads_as_it_was_written(sources: list[tuple[str, str, int]], mean: float) -> None:
    size = VectorModality(name="size", size=1, mean=(mean,), std=(1.0,))
    data = RunData((*MODALITIES, size), tuple(DataSource(file=f, sha256=s, rows=r, licence="") for f, s, r in sources))
    assert RunData.from_json(json.loads(json.dumps(data.to_json()))).differences(data) == []


def test_file_that_changes_between_the_splits_is_rejected(shop: Path) -> None:
    settings = config_file.read(shop)
    training = dataset.load(settings, "train")
    replace_words(shop, move=True)
    with pytest.raises(DataError, match=r"shop\.parquet: was changed while it was read"):
        RunData.from_data(training, dataset.load(settings, "test"))


def test_record_without_test_rows_is_completed_by_a_command_that_reads_them(make_config: Any, tmp_path: Path) -> None:
    """With shards, fit reads training rows only."""
    run, test = Run(tmp_path, make_config()), SOURCE.model_copy(update={"rows": 3})
    for data in (RunData(MODALITIES, (SOURCE,)), RunData(MODALITIES, (SOURCE, test)), RunData(MODALITIES, (SOURCE,))):
        keep_run_data(run, data)
    assert RunData.from_json(run.read("data.json")).sources == (SOURCE, test)
    with pytest.raises(RunError, match="has 4 rows of this split, and had 3"):
        keep_run_data(run, RunData(MODALITIES, (SOURCE, test.model_copy(update={"rows": 4}))))
