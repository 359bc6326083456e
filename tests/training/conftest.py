"""Small generated data, configurations and runs for the training tests. No file is stored or downloaded."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

from concord.model.modality import Modality
from concord.training.cli import app
from concord.training.concord import Concord
from concord.training.config import Config

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of ``datasets`` out of the user's home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def make_vae(make_vae: Callable[..., Any]) -> Callable[..., Concord]:
    """The models of the parent fixture, with the same weights, as ``Concord``."""
    return partial(make_vae, kind=Concord)


@pytest.fixture(scope="session")
def tiny_vae(tiny_modalities: tuple[Modality, ...], make_vae: Callable[..., Concord]) -> Concord:
    return make_vae(tiny_modalities)


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that ``configs/digits.toml`` names: generated digits, 60 training rows and 30 test rows.

    ``mnist-*.parquet`` hold grey 28x28 PNG, ``mnist-m-*.parquet`` coloured 32x32 lossless WebP, each with a ClassLabel.
    """
    folder = tmp_path_factory.mktemp("digits")
    generator = np.random.default_rng(0)
    for split, rows in (("train", 60), ("test", 30)):
        labels = (generator.permutation(rows) % 10).tolist()
        write_images(folder / f"mnist-{split}.parquet", [grey_digit(label, generator) for label in labels], labels, "PNG")
        labels = (generator.permutation(rows) % 10).tolist()
        write_images(folder / f"mnist-m-{split}.parquet", [colour_digit(label, generator) for label in labels], labels, "WEBP")
    return folder


MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def make_config(digits_folder: Path) -> MakeConfig:
    """A configuration on the generated digits that trains in seconds.

    Digit and word from one file; with ``photo``, digit, photo and word from two files. Keyword arguments update tables:
    ``make_config(joint={"epochs": 2})``. ``tables=True`` returns plain tables, for TOML.
    """

    def make_config(*, photo: bool = False, tables: bool = False, **changes: Any) -> Any:
        digit = {"name": "digit", "kind": "image", "channels": 1, "height": 28, "width": 28, "background": "black"}
        word = {"name": "word", "kind": "text", "length": 8, "alphabet": " abcdefghijklmnopqrstuvwxyz"}
        colour = {"name": "photo", "kind": "image", "channels": 3, "height": 32, "width": 32}
        first = {
            "train": "mnist-train.parquet",
            "test": "mnist-test.parquet",
            "columns": {"digit": "image", "word": "label"},
            "label": "label",
            "licence": "generated",
        }
        second = {**first, "train": "mnist-m-train.parquet", "test": "mnist-m-test.parquet", "columns": {"photo": "image"}}
        stage = {"epochs": 2, "batch_size": 20}
        fields: dict[str, Any] = {
            "name": "tiny",
            "threads": 1,
            "modalities": [digit, colour, word] if photo else [digit, word],
            "data": {
                "folder": str(digits_folder),
                "pairing": "class" if photo else "row",
                "random_offset": ["word"],
                "sources": [first, second] if photo else [first],
            },
            "network": {"latent": 4, "features": 8, "width": 2, "hidden": 8},
            "joint": stage,
            "refiner": {**stage, "steps": 2},
            "align": stage,
        }
        for name, change in changes.items():
            fields[name] = {**fields[name], **change} if isinstance(change, dict) and name in fields else change
        return fields if tables else Config.model_validate(fields)

    return make_config


@pytest.fixture(scope="session")
def write_config(make_config: MakeConfig) -> Callable[..., Path]:
    """Write a configuration of ``make_config`` as a TOML file: ``write_config(file, joint={"epochs": 2})``."""

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    def write_config(file: Path, **changes: Any) -> Path:
        fields = make_config(tables=True, **changes)
        file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in fields.items()))
        return file

    return write_config


def grey_digit(label: int, generator: np.random.Generator) -> Image.Image:
    image = Image.new("L", (28, 28))
    _write_digit(image, label, 255, generator)
    return image


def colour_digit(label: int, generator: np.random.Generator) -> Image.Image:
    background, ink = generator.integers(0, 120, 3), generator.integers(136, 256, 3)
    image = Image.new("RGB", (32, 32), tuple(background.tolist()))
    _write_digit(image, label, tuple(ink.tolist()), generator)
    return image


def _write_digit(image: Image.Image, label: int, ink: int | tuple[int, ...], generator: np.random.Generator) -> None:
    x, y = generator.integers(-3, 4, 2) + image.width // 2
    ImageDraw.Draw(image).text((x, y), str(label), fill=ink, font=ImageFont.load_default(size=22), anchor="mm")


def write_images(file: Path, images: list[Image.Image], labels: list[int], image_format: str) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=WORDS)})
    rows = {"image": [{"bytes": _file_bytes(image, image_format), "path": None} for image in images], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def _file_bytes(image: Image.Image, image_format: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, lossless=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class FinishedRun:
    """A run that the command line fitted and exported, and the output of both commands."""

    config: Path
    folder: Path
    bundle: Path
    fit_output: str
    export_output: str


@pytest.fixture(scope="session")
def finished(write_config: Callable[..., Path], made_once: Callable[[str, Callable[[Path], Any]], Path]) -> FinishedRun:
    """A run with digit, photo and word, paired by class. Copy the folder before changing it."""

    def fit_and_export(folder: Path) -> None:
        folder.mkdir()
        config = write_config(folder / "tiny.toml", photo=True)
        for command in ("fit", "export"):
            result = CliRunner().invoke(app, [command, str(config), "--out", str(folder / "run")])
            assert result.exit_code == 0, result.output
            (folder / f"{command}.txt").write_text(result.stdout)

    folder = made_once("finished", fit_and_export)
    fit, export = ((folder / f"{command}.txt").read_text() for command in ("fit", "export"))
    return FinishedRun(folder / "tiny.toml", folder / "run", folder / "run" / "bundle", fit, export)
