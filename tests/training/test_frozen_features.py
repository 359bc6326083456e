"""Frozen networks' vectors in place of pictures and texts."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.runtime.device import Device
from concord.model.runtime.frozen import open_files
from concord.training.encoders.find import find_encoder
from concord.training.encoders.packages import PACKAGES
from tests.support.encoders import write_image_encoder, write_text_encoder
from tests.support.server import ROOT


def run(file: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "concord.training.frozen_features", str(file), *map(str, words)]
    environment = {**os.environ, "CONCORD_CACHE": str(file.parent / "cache")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


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


def test_vectors_stand_where_values_stood(file: Path, tmp_path: Path) -> None:
    """With small networks, whose features are those of the encoder."""
    networks = {
        "--image-encoder": write_image_encoder(tmp_path / "photos"),
        "--text-encoder": write_text_encoder(tmp_path / "texts"),
    }
    options = [word for name, graph in networks.items() for word in (name, graph.parent)]
    done = run(file, "--image", "photo", "--text", "texts", *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    source, table = (pyarrow.parquet.read_table(one) for one in (file, file.with_name("rows-features.parquet")))
    assert table["label"].to_pylist() == source["label"].to_pylist()
    encoders = {
        kind: open_files(find_encoder(str(graph.parent), kind, tmp_path / "cache"), Device(), threads=1)
        for kind, graph in zip(("image", "text"), networks.values(), strict=True)
    }
    for kind, column in (("image", "photo"), ("text", "texts")):
        for value, vector in zip(source[column].to_pylist(), table[column].to_pylist(), strict=True):
            if value is None:
                assert vector is None
                continue
            encoder = encoders[kind]
            if kind == "image":
                inputs = [encoder.preprocessor.pixels(value["bytes"], DEFAULT_LIMITS)]
            else:
                inputs = [encoder.preprocessor.tokens(text, "cut", DEFAULT_LIMITS) for text in value]
            expected = encoder.features(inputs)
            np.testing.assert_allclose(vector, expected.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_value_that_cannot_be_read_is_told_of_with_its_row(file: Path, tmp_path: Path) -> None:
    graph = write_image_encoder(tmp_path / "photos")
    table = pyarrow.parquet.read_table(file)
    pictures = table["photo"].to_pylist()
    pictures[3] = {"bytes": b"no picture", "path": None}
    damaged = table.set_column(0, table.schema.field("photo"), pyarrow.array(pictures, table.schema.field("photo").type))
    pyarrow.parquet.write_table(damaged, file)
    done = run(file, "--image", "photo", "--image-encoder", graph.parent)
    assert (done.returncode, "row 3, column 'photo': not a PNG, JPEG or WebP" in done.stderr) == (1, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_column_that_is_not_there_is_told_of(file: Path) -> None:
    done = run(file, "--image", "picture")
    assert done.returncode == 1
    assert "no column 'picture'. Its columns are photo, texts, label" in done.stderr
    assert "Traceback" not in done.stderr
    assert "name a column with --image, --text, or both" in run(file).stderr
    missing = run(file.with_name("other.parquet"), "--image", "photo")
    assert (missing.returncode, "no such file" in missing.stderr) == (1, True)


@pytest.mark.skipif(
    not all(package.is_installed for package in PACKAGES.values()), reason="the frozen networks are not installed"
)
def test_the_frozen_networks_make_vectors(file: Path) -> None:
    done = run(file, "--image", "photo", "--text", "texts")
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(file.with_name("rows-features.parquet"))
    assert table["label"].to_pylist() == list(range(6))
    assert [vector and len(vector) for vector in table["photo"].to_pylist()] == [None, 1280] * 3
    assert [vector and len(vector) for vector in table["texts"].to_pylist()] == [None, 384, 384] * 2
