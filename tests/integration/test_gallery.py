"""A finished run exported with a gallery of training examples, and served. The frozen encoders are small and random."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from concord.client.client import Client
from concord.model import bundle as bundles
from concord.model.runtime import Runtime
from concord.training.cli import app
from tests.support.encoders import write_image_encoder, write_text_encoder
from tests.support.server import Service, running
from tests.support.shop import COLOURS, SHAPES

pytestmark = pytest.mark.slow  # a model is trained

ROWS = 40
CONFIG = """
name = "articles"
[[modalities]]
name = "photo"
kind = "image"
encoder = "{folder}/photos"
[[modalities]]
name = "title"
kind = "text"
encoder = "{folder}/texts"
too_long = "cut"
[[modalities]]
name = "icon"
kind = "image"
channels = 1
height = 8
width = 8
[[modalities]]
name = "label"
kind = "text"
length = 20
[[modalities]]
name = "price"
kind = "vector"
size = 1
[data]
pairing = "row"
folder = "{folder}"
cache = "{folder}/cache"
[[data.sources]]
train = "articles.parquet"
split = "split"
columns = {{ photo = "photo", title = "titles", icon = "photo", label = "label", price = "price" }}
licence = "generated"
[network]
latent = 8
features = 16
hidden = 16
width = 2
[joint]
epochs = 1
[refiner]
epochs = 1
steps = 1
[align]
epochs = 1
"""
GALLERY = """
[gallery.photo]
ids = "sku"
values = true
side = 24
[gallery.title]
values = true
rows = 9
[gallery.icon]
[gallery.label]
values = true
[gallery.price]
ids = "number"
"""


def photograph(colour: str, generator: np.random.Generator) -> bytes:
    """Return a PNG of 60 x 40 pixels."""
    pixels = np.clip(np.array(COLOURS[colour]) + generator.normal(size=(40, 60, 3)) * 40, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_rows() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        colour, shape = list(COLOURS)[number % 3], SHAPES[number % 4]
        titles = [f"a {word} {colour} {shape}" for word in ("new", "fine", "plain")[: 1 + number % 3]]
        rows.append(
            {
                "photo": photograph(colour, generator) if number % 4 else None,
                "titles": titles if number % 5 else None,
                "label": f"{colour} {shape}",
                "price": float(number % 7),
                "sku": f"A-{number}",
                "number": number,
                "half": number + 0.5,
                "split": "test" if number % 8 == 7 else "train",
            }
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a gallery, with its data, in ``run``."""
    folder = tmp_path_factory.mktemp("gallery")
    write_image_encoder(folder / "photos")
    write_text_encoder(folder / "texts")
    write_rows(folder / "articles.parquet", make_rows())
    (folder / "plain.toml").write_text(CONFIG.format(folder=folder))
    (folder / "gallery.toml").write_text(CONFIG.format(folder=folder) + GALLERY)
    for command in ("fit", "export"):
        result = CliRunner().invoke(app, [command, str(folder / "plain.toml"), "--out", str(folder / "run")])
        assert result.exit_code == 0, result.output
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(file)


def export(config: Path, to: Path, *options: str) -> Any:
    arguments = ["export", str(config), "--out", str(config.parent / "run"), "--to", str(to), *options]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def exported(folder: Path) -> tuple[Path, str]:
    """The bundle with galleries, and what export printed."""
    result = export(folder / "gallery.toml", folder / "bundle")
    assert result.exit_code == 0, result.output
    return folder / "bundle", result.stdout


@pytest.fixture(scope="module")
def runtime(exported: tuple[Path, str]) -> Runtime:
    return Runtime.load(exported[0], threads=1)


@pytest.fixture(scope="module")
def service(exported: tuple[Path, str]) -> Iterator[Service]:
    with running(CONCORD_BUNDLE=str(exported[0])) as service:
        yield service


TRAINING = [(number, row) for number, row in enumerate(make_rows()) if row["split"] == "train"]


def test_gallery_has_the_training_rows_with_the_modality(runtime: Runtime) -> None:
    galleries = runtime.galleries
    photos = [number for number, row in TRAINING if row["photo"]]
    assert galleries["photo"].ids == [f"A-{number}" for number in photos]
    assert galleries["icon"].ids == [str(number) for number in photos], "without ids, the number of the row in the file"
    assert galleries["price"].ids == [str(number) for number, _ in TRAINING]
    titles = {str(number): row["titles"] for number, row in TRAINING if row["titles"]}
    assert len(galleries["title"].ids) == 9, "at most rows"
    assert [*galleries["title"].texts] == [titles[number] for number in galleries["title"].ids]
    assert [*galleries["label"].texts] == [[row["label"]] for _, row in TRAINING]
    assert {name: gallery.has_values for name, gallery in galleries.items()} == {
        "photo": True,
        "title": True,
        "icon": False,
        "label": True,
        "price": False,
    }


def test_each_training_value_finds_its_own_row(service: Service) -> None:
    """Of pictures, of several texts, and of values without a frozen encoder."""
    with Client(str(service.client.base_url)) as client:
        for column, name, key in (("photo", "photo", "sku"), ("titles", "title", None), ("label", "label", None)):
            rows = [(number, row) for number, row in TRAINING if row[column]][:6]
            results = client.cross_generate([{name: row[column]} for _, row in rows], targets=[name], nearest=40).results
            for (number, row), result in zip(rows, results, strict=True):
                found = {example.id: example.similarity for example in result.nearest[name]}
                own = found.get(row[key] if key else str(number))
                assert own is None or own == pytest.approx(1, abs=1e-4), "the title may not be among the 9 of its gallery"
                assert own is not None or name == "title"
                assert max(found.values()) <= 1
                assert list(found.values()) == sorted(found.values(), reverse=True)


def test_examples_of_a_caption_are_those_of_its_posterior(service: Service, runtime: Runtime) -> None:
    with Client(str(service.client.base_url)) as client:
        options = {"targets": ["photo"], "nearest": 3, "return_embedding": True}
        (result,) = client.cross_generate({"title": "a new red cup"}, **options).results  # type: ignore[arg-type]
    gallery, mean = runtime.galleries["photo"], result.embedding
    assert mean is not None
    cosines = gallery.mean @ mean / np.linalg.norm(mean)
    assert [example.id for example in result.nearest["photo"]] == [gallery.ids[row] for row in np.argsort(-cosines)[:3]]
    for example in result.nearest["photo"]:
        (thumbnail,) = example.values
        assert isinstance(thumbnail, Image.Image)
        assert thumbnail.size == (24, 24)


def test_thumbnail_shows_the_centre_of_its_picture(runtime: Runtime) -> None:
    gallery, rows = runtime.galleries["photo"], {row["sku"]: row["photo"] for _, row in TRAINING}
    for sku, thumbnail in zip(gallery.ids[:5], gallery.thumbnails, strict=False):
        with Image.open(io.BytesIO(rows[sku])) as photo, Image.open(io.BytesIO(thumbnail)) as small:
            expected = np.asarray(photo.crop((10, 0, 50, 40)).resize((24, 24)), float)
            assert np.abs(np.asarray(small.convert("RGB"), float).mean((0, 1)) - expected.mean((0, 1))).max() < 4


def test_export_and_card_say_that_the_bundle_contains_training_data(exported: tuple[Path, str]) -> None:
    path, output = exported
    photos = sum(row["photo"] is not None for _, row in TRAINING)
    held = f"photo: ids and thumbnails of 24 pixels of {photos} rows"
    assert f"it contains training data: {held}\n" in output
    card = (path / bundles.CARD).read_text()
    assert f"This bundle contains training data:\n\n- {held}\n- title: ids and texts of 9 rows\n" in card


def test_bundle_without_gallery_is_the_same_as_before(folder: Path, exported: tuple[Path, str]) -> None:
    """Only the galleries differ, and no file but the manifest and the card knows of them."""
    plain, shown = bundles.read(folder / "run" / "bundle"), bundles.read(exported[0])
    assert (plain.manifest.format, shown.manifest.format) == (5, 7)
    assert "galleries" not in json.loads((plain.path / bundles.MANIFEST).read_text())
    assert "training data:" not in (plain.path / bundles.CARD).read_text()
    added = shown.manifest.files.keys() - plain.manifest.files.keys()
    assert added == {f"gallery-{name}.npz" for name in shown.manifest.galleries}
    assert all(shown.manifest.files[name] == entry for name, entry in plain.manifest.files.items())
    assert plain.manifest.provenance.config_sha256 == shown.manifest.provenance.config_sha256


def test_gallery_with_one_changed_byte_is_refused(exported: tuple[Path, str], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(exported[0], tmp_path / "damaged"))
    file = damaged / "gallery-photo.npz"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(bundles.BundleError, match=r"gallery-photo\.npz.*changed or cut short"):
        bundles.read(damaged)


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ('[gallery.photo]\nids = "name"\n', r"gallery: no column 'name' for ids. Its columns are \['photo', "),
        ('[gallery.price]\nids = "half"\n', r"row 0, column 'half': received 0.5 as an id; an id is a text of at most 128"),
        ('[gallery.label]\nids = "titles"\n', r"row 0, column 'titles': received None as an id"),
    ],
)
def test_ids_that_are_none_are_an_error(folder: Path, tmp_path: Path, gallery: str, message: str) -> None:
    config = folder / "ids.toml"
    config.write_text((folder / "plain.toml").read_text() + gallery)
    result = export(config, tmp_path / "bundle")
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "bundle").exists()


def test_other_rows_than_those_of_training_are_an_error(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "articles.parquet", make_rows()[:-1])
    result = export(folder / "gallery.toml", tmp_path / "bundle", "--data", str(tmp_path))
    assert result.exit_code == 2, result.output
    assert "the gallery takes the rows of training, and this file has another content" in result.stderr
    assert "--data" in result.stderr
    assert not (tmp_path / "bundle").exists()
