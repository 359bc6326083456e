"""Data larger than the memory it may take: the same batches, from a file."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from model.modality import ImageModality, TextModality, VectorModality
from tests.server import ROOT
from training import data
from training.config import Config, Data, Source
from training.room import copy_rows, moments, room

SIDE = 128
BYTES = 3 * SIDE * SIDE
PHOTO = ImageModality(name="photo", channels=3, height=SIDE, width=SIDE)
TITLE = TextModality(name="title", length=40, alphabet=" abcdefghij")
SIZES = VectorModality(name="sizes", size=600)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``TMPDIR``, for this test alone."""
    own = tmp_path / "files"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    return own


def mapped_bytes(folder: Path) -> int:
    """Of this process's files in a folder, whether they have a name or not."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_what_is_too_much_for_memory_lies_in_a_file_of_no_name(folder: Path) -> None:
    small = room((10, 5), np.float32, most_bytes=200)
    assert mapped_bytes(folder) == 0
    large = room((1000, 500), np.float32, most_bytes=200)
    assert mapped_bytes(folder) >= large.nbytes
    assert list(folder.iterdir()) == []
    for values in (small, large):
        assert not values.any()
        values[3] = 7
        assert values.sum() == 7 * values.shape[1]
    del values, large
    assert mapped_bytes(folder) == 0


def test_a_disk_without_room_is_told_of_before_anything_is_written(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match=r"has no room for 4,000,000 bytes .* TMPDIR, or raise data\.memory_mb"):
            room((1000, 1000), np.float32, most_bytes=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []
    assert mapped_bytes(folder) == 0


def test_rows_are_copied_and_measured_in_parts() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (10_000, 3)).astype(np.float32)
    rows = np.random.default_rng(1).permutation(10_000)[:9000]
    np.testing.assert_array_equal(copy_rows(values, rows, most_bytes=1), values[rows])
    mean, std = moments(values, rows)
    np.testing.assert_allclose(mean, values[rows].astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values[rows].astype(float).std(0), rtol=1e-12)


def write(file: Path, rows: int) -> None:
    """Pictures, titles of which a row has several, and sizes, a third of each missing."""
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(16):
        path = file.parent / f"{number}.png"
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))  # small files, large once decoded
        coarse.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)
        pictures.append({"bytes": path.read_bytes(), "path": None})
    words = ["".join(generator.choice(list("abcdefghij"), 30)) for _ in range(64)]
    sizes = generator.normal(size=(16, 600)).tolist()
    table: dict[str, list[Any]] = {
        "photo": [None if n % 3 == 1 else pictures[n % 16] for n in range(rows)],
        "title": [None if n % 3 == 2 else [words[(n + k) % 64] for k in range(n % 5)] + ["a"] for n in range(rows)],
        "sizes": [None if n % 3 == 0 else sizes[n % 16] for n in range(rows)],
    }
    features = datasets.Features(
        photo=datasets.Image(), title=datasets.List(datasets.Value("string")), sizes=datasets.List(datasets.Value("float32"))
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(file, batch_size=100)


def configuration(memory_mb: int) -> Config:
    """Of such a file."""
    columns = {"photo": "photo", "title": "title", "sizes": "sizes"}
    source = Source(train="rows.parquet", test="rows.parquet", columns=columns, licence="CC0")
    own = Data(pairing="row", memory_mb=memory_mb, sources=(source,))
    return Config(name="own", modalities=(PHOTO, TITLE, SIZES), data=own)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_the_same_from_memory_and_from_a_file(tmp_path: Path, folder: Path, shuffle: bool) -> None:
    write(tmp_path / "rows.parquet", 500)

    plain, mapped = (data.load(configuration(memory_mb), "train", tmp_path) for memory_mb in (1000, 1))
    assert mapped_bytes(folder) > 500 * BYTES
    assert plain.modalities == mapped.modalities
    for one, other in zip(plain.batches(1, 64, 3, shuffle=shuffle), mapped.batches(1, 64, 3, shuffle=shuffle), strict=True):
        assert torch.equal(one.present, other.present)
        for name in ("photo", "title", "sizes"):
            assert torch.equal(one.arrays[name], other.arrays[name])


EPOCH = """
import sys
from pathlib import Path
from tests.training.test_room import configuration
from training import data

rows = data.load(configuration(int(sys.argv[1])), "train", Path(sys.argv[2]))
print(sum(len(batch) for batch in rows.batches(0, 32, 0)))
"""


def peak_of_epoch(folder: Path, rows: int, memory_mb: int) -> int:
    """Bytes of memory that reading the rows and an epoch of batches takes, without what is a file's: that the system could
    have back."""
    folder.mkdir()
    write(folder / "rows.parquet", rows)
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "TMPDIR": str(folder)}
    peak, command = 0, [sys.executable, "-c", EPOCH, str(memory_mb), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            status = Path(f"/proc/{run.pid}/status").read_text()
            peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.005)
        assert run.stdout is not None
        assert int(run.stdout.read()) == rows // 32 * 32
    return peak


def test_memory_stays_flat_over_ten_times_what_it_may_take(tmp_path: Path) -> None:
    memory_mb = 20
    fits = memory_mb * 2**20 // BYTES
    once = peak_of_epoch(tmp_path / "once", fits, memory_mb)
    ten_times = peak_of_epoch(tmp_path / "ten times", 10 * fits, memory_mb)
    held = peak_of_epoch(tmp_path / "held", 10 * fits, 1000)
    growth = 9 * memory_mb * 2**20  # of the pictures alone, where they are held
    assert ten_times - once < growth / 2
    assert held - once > growth * 0.9
