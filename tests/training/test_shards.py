"""Training rows by process: each reads its row groups of a Parquet file, and no others."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from concord.model.modality import CategoricalModality, VectorModality
from concord.training import config_file
from concord.training.config import Config, Source
from concord.training.data.dataset import Dataset, DatasetShard
from concord.training.data.sources import Shard, read_table
from concord.training.errors import DataError
from tests.support.server import ROOT

GROUPS, GROUP_ROWS = 5, 8
ROWS = GROUPS * GROUP_ROWS
CONFIG = """
name = "shards"
threads = 1
[[modalities]]
name = "number"
kind = "vector"
size = 1
mean = [0.0]
std = [1.0]
[[modalities]]
name = "brand"
kind = "categorical"
[data]
folder = "{folder}"
pairing = "row"
shards = true
[[data.sources]]
train = "rows.parquet"
held_out = 0.2
columns = {{ number = "number", brand = "brand" }}
licence = "generated"
[network]
latent = 2
features = 4
hidden = 4
[joint]
epochs = 2
batch_size = 8
[refiner]
epochs = 1
batch_size = 8
steps = 1
[align]
epochs = 1
batch_size = 8
"""
# The command, which notes the columns and row groups that each process reads.
COMMAND = """
import json, os, sys
import pyarrow.parquet
original = pyarrow.parquet.ParquetFile.iter_batches
def iter_batches(self, *arguments, row_groups=None, columns=None, **options):
    with open(f"{sys.argv[-1]}/reads-{os.environ.get('RANK', 0)}.jsonl", "a") as stream:
        stream.write(json.dumps([columns, row_groups]) + "\\n")
    return original(self, *arguments, row_groups=row_groups, columns=columns, **options)
pyarrow.parquet.ParquetFile.iter_batches = iter_batches
from concord.training.cli import app
app()
"""
MODALITIES = {
    "number": VectorModality(name="number", size=1, mean=(0.0,), std=(1.0,)),
    "brand": CategoricalModality(name="brand", classes=("a", "b")),
}
SOURCE = Source(train="rows.parquet", held_out=0.2, columns={"number": "number", "brand": "brand"}, licence="generated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.parquet: the numbers 0, 1, 2, … and two brands."""
    path = tmp_path_factory.mktemp("shards")
    table = pa.table({"number": np.arange(ROWS, dtype=np.float32), "brand": ["ab"[row % 2] for row in range(ROWS)]})
    pq.write_table(table, path / "rows.parquet", row_group_size=GROUP_ROWS)
    (path / "shards.toml").write_text(CONFIG.format(folder=path))
    (path / "command.py").write_text(COMMAND)
    return path


def read(folder: Path, shard: Shard | None) -> list[int]:
    """Return the numbers of the training rows."""
    return read_table(SOURCE, "train", MODALITIES, folder, shard=shard).columns["number"].values[:, 0].astype(int).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_are_whole_row_groups_and_partition_the_training_rows(folder: Path, size: int) -> None:
    shards = [read(folder, Shard(rank, size, "0" * 64)) for rank in range(size)]
    assert sorted(number for shard in shards for number in shard) == read(folder, None)
    groups = [{number // GROUP_ROWS for number in shard} for shard in shards]
    assert sorted(group for found in groups for group in found) == list(range(GROUPS))


def test_more_processes_than_row_groups_are_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.parquet: has 5 row groups, and 6 processes need one each.*shards = false"):
        read(folder, Shard(0, 6, None))


def test_shard_without_training_rows_is_rejected(tmp_path: Path) -> None:
    table = pa.table({"number": [0.0, 1.0], "brand": ["a", "b"], "split": ["train", "test"]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    source = Source.model_validate({**SOURCE.model_dump(exclude={"held_out"}), "split": "split"})
    with pytest.raises(DataError, match="the shard of process 1 of 2 has no training row"):
        read_table(source, "train", MODALITIES, tmp_path, shard=Shard(1, 2, None))


def test_epoch_of_a_shard_has_equal_parts_of_every_batch(folder: Path) -> None:
    """The larger shard leaves out other rows in every epoch, so that all processes take the same number of steps."""
    settings = config_file.read(folder / "shards.toml")
    table = read_table(SOURCE, "train", MODALITIES, folder, shard=Shard(0, 2, "0" * 64))
    data = Dataset([table], list(MODALITIES.values()), settings.data, None)
    data.shard = DatasetShard(0, 2, 12)
    assert len(data) > 12
    assert data.steps_per_epoch(8) == 3
    seen: Counter[int] = Counter()
    for epoch in range(20):
        numbers = [number for batch in data.batches(epoch, 8, 0) for number in batch.arrays["number"][:, 0].tolist()]
        assert len(numbers) == len(set(numbers)) == 12
        seen.update(map(int, numbers))
    assert len(seen) == len(data)


@pytest.mark.parametrize("change", [{"contrast": {"epochs": 1}}, {"align": {"contrast_weight": 1.0}}])
def test_shards_with_contrastive_learning_are_rejected(folder: Path, change: dict[str, Any]) -> None:
    fields = config_file.read(folder / "shards.toml").model_dump()
    for table, values in change.items():
        fields[table] |= values
    with pytest.raises(ValidationError, match=r"data\.shards = true takes pairing"):
        Config.model_validate(fields)


def fit(folder: Path, run: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, str(folder / "command.py"), "fit", str(folder / "shards.toml"), *options, "--out", str(run)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.mark.slow
def test_row_group_that_one_process_reads_is_read_by_no_other(folder: Path, tmp_path: Path) -> None:
    """Only rank zero reads the column of classes, whose statistics it computes, as a whole. Then one process evaluates."""
    run = tmp_path / "run"
    run.mkdir()
    result = fit(folder, run, 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Evaluate in one: concord evaluate") == 1
    reads = [[json.loads(line) for line in (run / f"reads-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    groups = [[group for columns, found in own if "number" in columns for group in found] for own in reads]
    assert [sorted(own) for own in groups] == [[0, 2, 4], [1, 3]]
    assert [sum(found is None for _, found in own) for own in reads] == [1, 0]
    rows = ROWS - round(0.2 * ROWS)
    assert [source["rows"] for source in json.loads((run / "data.json").read_text())["sources"]] == [rows]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("joint", 6), ("refiner", 3), ("align", 3)]
    evaluated = subprocess.run(
        [sys.executable, "-m", "concord.service", "evaluate", str(folder / "shards.toml"), "--out", str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    sources = json.loads((run / "data.json").read_text())["sources"]
    assert [source["rows"] for source in sources] == [rows, ROWS - rows]


@pytest.mark.slow
def test_unreadable_value_in_one_shard_ends_all_processes(folder: Path, tmp_path: Path) -> None:
    numbers = [np.inf if row == GROUP_ROWS + 1 else float(row) for row in range(ROWS)]
    table = pa.table({"number": numbers, "brand": ["ab"[row % 2] for row in range(ROWS)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=GROUP_ROWS)
    run = tmp_path / "run"
    run.mkdir()
    result = fit(folder, run, 2, "--data", str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.count("row 9, column 'number': invalid number") == 2, "both processes say why they end"
    assert not (run / "config.json").exists()
