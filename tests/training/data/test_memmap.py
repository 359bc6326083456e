"""Data above the memory limit: the same batches, from a memory-mapped file."""

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

from concord.model.modality import ImageModality, TextModality, VectorModality
from concord.training.config import Config, Data, Source
from concord.training.data import dataset
from concord.training.data.memmap import allocate, copy_rows, moments
from tests.support.server import ROOT

SIDE = 128
BYTES = 3 * SIDE * SIDE
PHOTO = ImageModality(name="photo", channels=3, height=SIDE, width=SIDE)
TITLE = TextModality(name="title", length=40, alphabet=" abcdefghij")
SIZES = VectorModality(name="sizes", size=600)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder that ``tempfile`` uses during the test."""
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mapped_bytes(folder: Path) -> int:
    """Bytes that this process maps from files in a folder, unnamed files included."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_allocate_above_limit_maps_an_unnamed_file(folder: Path) -> None:
    small = allocate((10, 5), np.float32, max_bytes=200)
    assert mapped_bytes(folder) == 0
    large = allocate((1000, 500), np.float32, max_bytes=200)
    assert mapped_bytes(folder) >= large.nbytes
    assert list(folder.iterdir()) == []
    for values in (small, large):
        assert not values.any()
        values[3] = 7
        assert values.sum() == 7 * values.shape[1]
    del values, large
    assert mapped_bytes(folder) == 0


def test_allocate_on_full_disk_raises_before_writing(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot reserve 4,000,000 bytes .* TMPDIR .*, or raise data\.memory_mb"):
            allocate((1000, 1000), np.float32, max_bytes=200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(folder.iterdir()) == []
    assert mapped_bytes(folder) == 0


def test_copy_rows_and_moments_in_chunks_equal_numpy() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (10_000, 3)).astype(np.float32)
    rows = np.random.default_rng(1).permutation(10_000)[:9000]
    np.testing.assert_array_equal(copy_rows(values, rows, max_bytes=1), values[rows])
    numbers = values[rows].astype(float)
    whole, parts = moments(lambda: iter([numbers])), moments(lambda: iter(np.array_split(numbers, 77)))
    assert whole is not None
    assert parts is not None
    assert np.array_equal(whole.mean, parts.mean)  # to the last bit: the parts have no influence
    assert np.array_equal(whole.std, parts.std)
    np.testing.assert_allclose(whole.mean, numbers.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.std, numbers.std(0), rtol=1e-12)
    assert moments(lambda: iter([])) is None


@pytest.mark.parametrize("unit", [1e-300, 1e-160, 1.0, 1e11, 1e160, 1e300])
def test_moments_of_numbers_in_any_unit_are_exact(unit: float) -> None:
    numbers = np.random.default_rng(0).normal(3.0, 2.0, (5000, 2)) * [1.0, unit]
    found = moments(lambda: iter([numbers]))
    assert found is not None
    np.testing.assert_allclose(found.mean, np.mean(numbers / [1, unit], axis=0) * [1, unit], rtol=1e-12)
    np.testing.assert_allclose(found.std, np.std(numbers / [1, unit], axis=0) * [1, unit], rtol=1e-12)


@pytest.mark.parametrize("number", [0.0, 0.1, 2.4e9, -1.7e308])
def test_moments_of_one_number_are_that_number_and_zero(number: float) -> None:
    found = moments(lambda: iter([np.full((5001, 1), number)]))
    assert found is not None
    assert (found.mean.tolist(), found.std.tolist()) == ([number], [0.0])


def write(file: Path, rows: int) -> None:
    """Write images, titles (multiple per row) and size vectors; a third of each is missing."""
    generator = np.random.default_rng(0)
    images = []
    for number in range(16):
        path = file.parent / f"{number}.png"
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))  # a small file, large when decoded
        coarse.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)
        images.append({"bytes": path.read_bytes(), "path": None})
    words = ["".join(generator.choice(list("abcdefghij"), 30)) for _ in range(64)]
    sizes = generator.normal(size=(16, 600)).tolist()
    table: dict[str, list[Any]] = {
        "photo": [None if n % 3 == 1 else images[n % 16] for n in range(rows)],
        "title": [None if n % 3 == 2 else [words[(n + k) % 64] for k in range(n % 5)] + ["a"] for n in range(rows)],
        "sizes": [None if n % 3 == 0 else sizes[n % 16] for n in range(rows)],
    }
    features = datasets.Features(
        photo=datasets.Image(), title=datasets.List(datasets.Value("string")), sizes=datasets.List(datasets.Value("float32"))
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(file, batch_size=100)


def configuration(memory_mb: int) -> Config:
    """A configuration of a file from ``write``."""
    columns = {"photo": "photo", "title": "title", "sizes": "sizes"}
    source = Source(train="rows.parquet", test="rows.parquet", columns=columns, licence="CC0")
    data = Data(pairing="row", memory_mb=memory_mb, sources=(source,))
    return Config(name="user", modalities=(PHOTO, TITLE, SIZES), data=data)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_from_mapped_file_equal_batches_from_memory(tmp_path: Path, folder: Path, shuffle: bool) -> None:
    write(tmp_path / "rows.parquet", 500)

    plain, mapped = (dataset.load(configuration(memory_mb), "train", tmp_path) for memory_mb in (1000, 1))
    assert mapped_bytes(folder) > 500 * BYTES
    assert plain.modalities == mapped.modalities
    for one, other in zip(plain.batches(1, 64, 3, shuffle=shuffle), mapped.batches(1, 64, 3, shuffle=shuffle), strict=True):
        assert torch.equal(one.present, other.present)
        for name in ("photo", "title", "sizes"):
            assert torch.equal(one.arrays[name], other.arrays[name])


EPOCH = """
import sys
from pathlib import Path
from tests.training.data.test_memmap import configuration
from concord.training.data import dataset

rows = dataset.load(configuration(int(sys.argv[1])), "train", Path(sys.argv[2]))
print(sum(len(batch) for batch in rows.batches(0, 32, 0)))
"""


def peak_memory(folder: Path, rows: int, memory_mb: int) -> int:
    """Return the peak of anonymous memory in bytes while the folder's rows are loaded and one epoch of batches is read.

    File-backed pages are not counted: the system can reclaim them.
    """
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


@pytest.mark.slow
def test_memory_stays_flat_at_ten_times_the_limit(tmp_path: Path) -> None:
    memory_mb = 20
    rows_at_limit = memory_mb * 2**20 // BYTES
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, rows in ((few, rows_at_limit), (many, 10 * rows_at_limit)):
        folder.mkdir()
        write(folder / "rows.parquet", rows)
    at_limit = peak_memory(few, rows_at_limit, memory_mb)
    mapped = peak_memory(many, 10 * rows_at_limit, memory_mb)
    in_memory = peak_memory(many, 10 * rows_at_limit, 1000)
    growth = 9 * memory_mb * 2**20  # of the images when they are kept in memory
    assert mapped - at_limit < growth / 2
    assert in_memory - at_limit > growth * 0.9
