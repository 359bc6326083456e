"""Photographs and sentences through frozen encoders: init, fit, export, serve, and a POST of a picture.

The networks are small and random. Where the packages of the real ones are installed, they are used as well.
"""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from concord.client.client import Client
from concord.model.bundle import MANIFEST, BundleError, read
from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.runtime import Runtime
from concord.service.batch.dataset import BatchJob, Embedder, plan
from concord.training import config_file
from concord.training.cli import app
from concord.training.data.dataset import load
from concord.training.encoders.packages import PACKAGES
from tests.support.encoders import FEATURES, write_image_encoder, write_text_encoder
from tests.support.images import to_base64
from tests.support.server import Service, running
from tests.support.shop import COLOURS, SHAPES

pytestmark = pytest.mark.slow  # a model is trained

CONFIGS = Path(config_file.__file__).parent / "configs"
ROWS = 60
OVERRIDES = ("--epochs", "1")


def photograph(colour: str, generator: np.random.Generator) -> bytes:
    """Return a JPEG of 120 x 80 pixels."""
    pixels = np.clip(np.array(COLOURS[colour]) + generator.normal(size=(80, 120, 3)) * 30, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_articles(file: Path) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        colour = list(COLOURS)[generator.integers(3)]
        title = f"a {generator.choice(['fine', 'plain'])} new {colour} {SHAPES[generator.integers(4)]}"
        photo = photograph(colour, generator)
        row = {"photo": photo if number % 5 else None, "back": photograph(colour, generator) if number % 3 else None}
        rows.append({**row, "title": title if number % 4 else None, "price": float(number % 7)})
    datasets.Dataset.from_list(rows).to_parquet(file)
    return rows


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output


def make_bundle(folder: Path, *options: str) -> Path:
    """Run init, fit and export."""
    config = folder / "articles.toml"
    run("init", str(folder / "articles.parquet"), "--out", str(config), *options)
    config.write_text(config.read_text().replace('cache = "runs/cache"', f'cache = "{folder / "cache"}"'))
    for command in ("fit", "export"):
        run(command, str(config), "--out", str(folder / "run"), *OVERRIDES)
    return folder / "run" / "bundle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("articles")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return write_articles(folder / "articles.parquet")


@pytest.fixture(scope="module")
def bundle(folder: Path, rows: list[dict[str, Any]]) -> Path:
    assert len(rows) == ROWS  # the file is written
    write_image_encoder(folder / "tiny-photos", licence="MIT", origin="a random network")
    write_text_encoder(folder / "tiny-texts")
    return make_bundle(folder, "--image-encoder", str(folder / "tiny-photos"), "--text-encoder", str(folder / "tiny-texts"))


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    with running(CONCORD_BUNDLE=str(bundle)) as service:
        yield service


def test_picture_and_sentence_are_embedded_from_a_form(service: Service, rows: list[dict[str, Any]]) -> None:
    response = service.client.post("/embed", files={"photo": ("p.jpg", rows[1]["photo"]), "title": (None, rows[1]["title"])})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["data"][0]["modalities"] == ["photo", "title"]
    assert (body["usage"]["images"], body["usage"]["text_characters"]) == (1, len(rows[1]["title"]))
    timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert float(timing["features"]) > 0
    without = service.client.post("/embed", json={"inputs": [{"price": 3.0}]})
    assert "features;dur=0.00" in without.headers["server-timing"]


def test_training_and_serving_have_the_same_features_and_embeddings(
    bundle: Path, folder: Path, service: Service, rows: list[dict[str, Any]]
) -> None:
    data = load(config_file.read(folder / "articles.toml"), "test")
    batch = next(data.batches(0, len(data), 0, shuffle=False))
    runtime = Runtime.load(bundle, threads=1)
    inputs = {name: array.numpy() for name, array in batch.arrays.items()}
    expected = runtime.encode(inputs, batch.present.numpy()).mean
    order = np.sort(np.random.default_rng(0).permutation(ROWS)[: len(data)])  # as held_out chooses
    items = [
        {name: to_base64(v) if isinstance(v, bytes) else v for name, v in rows[row].items() if v is not None} for row in order
    ]
    result = service.client.post("/embed", json={"inputs": items}).json()["data"]
    actual = np.array([one["embedding"] for one in result])
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_generated_features_are_accepted_as_inputs(service: Service) -> None:
    with Client(str(service.client.base_url)) as client:
        (result,) = client.cross_generate({"title": "a new red cup"}, targets=["photo", "title"], latent="mean").results
        photo = result.generated["photo"][0]
        assert isinstance(photo, np.ndarray)
        assert photo.shape == (FEATURES,)
        embedded = client.embed([{"photo": photo}, {"title": result.generated["title"][0]}])
        assert embedded.matrix.shape[0] == 2
        assert embedded.usage["images"] == 0


def test_several_texts_are_embedded_as_the_mean_of_their_features(service: Service, bundle: Path) -> None:
    texts = ["a new red cup", "a plain lamp", "fine"]
    encoder = Runtime.load(bundle, threads=1).encoders["title"]
    features = encoder.features([encoder.preprocessor.tokens(text, "cut", DEFAULT_LIMITS) for text in texts])
    items = [{"title": texts}, {"title": texts[::-1]}, {"title": features.mean(axis=0).tolist()}, {"title": texts[:1]}]
    with Client(str(service.client.base_url)) as client:
        embedded = client.embed([*items, {"title": texts[0]}])
        several, reverse, mean, one, single = embedded.matrix
        generated = client.cross_generate({"title": tuple(texts)}, targets=["price"], latent="mean").results[0].generated
    np.testing.assert_allclose(reverse, several, atol=1e-5)
    np.testing.assert_allclose(mean, several, atol=1e-5)
    np.testing.assert_allclose(one, single, atol=1e-5)
    assert np.abs(several - single).max() > 1e-3
    assert embedded.usage["text_characters"] == 2 * sum(map(len, texts)) + 2 * len(texts[0])
    assert np.isfinite(generated["price"][0]).all()


@pytest.mark.parametrize(
    ("item", "code", "detail"),
    [
        ({"title": ["a cup"] * 17}, "bad_text", "17 texts, 1 to 16 are allowed"),
        ({"title": ["x" * 6_000, "y" * 6_000]}, "too_large", "12000 characters in total, 10000 are allowed"),
        ({"photo": to_base64(b"no picture")}, "bad_image", "not a PNG, JPEG or WebP"),
        ({"photo": [1.0]}, "bad_vector", "12 are expected"),
        ({"title": "   "}, "bad_text", "is empty"),
        ({"title": 3}, "wrong_type", "a text is a string"),
        ({"title": "x" * 20_000}, "too_large", "10000 are allowed"),
    ],
)
def test_invalid_value_is_rejected(service: Service, item: dict[str, Any], code: str, detail: str) -> None:
    (error,) = service.client.post("/embed", json={"inputs": [item]}).json()["errors"]
    assert error["code"] == code
    assert detail in error["detail"]


def test_long_sentence_is_cut_and_openai_clients_send_texts(service: Service) -> None:
    texts = ["a red cup " * 9, "a red cup"]
    response = service.client.post("/v1/embeddings", json={"model": "articles", "input": texts})
    assert response.status_code == 200, response.text
    assert len(response.json()["data"]) == 2


def test_openapi_examples_and_the_page_work(service: Service) -> None:
    document = service.client.get("/openapi.json").json()
    for example in document["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
        assert service.client.post("/embed", json=example["value"]).status_code == 200
    described = {m["name"]: m for m in service.client.get("/v1/models").json()["data"][0]["modalities"]}
    assert described["photo"]["kind"] == "image"
    assert described["photo"]["encoder"] == "tiny-photos"
    assert described["photo"]["media_types"] == ["image/png", "image/jpeg", "image/webp"]


def test_bulk_job_gives_the_embeddings_of_requests(
    bundle: Path, folder: Path, service: Service, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source, output = str(folder / "articles.parquet"), str(tmp_path / "output")
    job = BatchJob(bundle, {"photo": "photo", "title": "title"})
    parts, _ = plan(job, source, output)
    embedder = Embedder(job, source, output)
    for part in parts:
        embedder.process(part)
    embeddings = pq.read_table(output)["embedding"].to_pylist()
    items = [{"photo": to_base64(row["photo"]), "title": row["title"]} for row in rows[1:4]]
    expected = service.client.post("/embed", json={"inputs": items}).json()["data"]
    np.testing.assert_allclose(embeddings[1:4], [one["embedding"] for one in expected], atol=1e-5)


@pytest.mark.usefixtures("bundle")
def test_second_fit_computes_no_feature_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord.model.runtime.frozen.open_files", lambda *_: pytest.fail("features were computed again"))
    run("fit", str(folder / "articles.toml"), "--out", str(folder / "second"), *OVERRIDES, "--seed", "1")


@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_bundle_with_one_changed_byte_is_refused(bundle: Path, tmp_path: Path, position: float) -> None:
    names = [*read(bundle).manifest.files]
    assert {"encoder-tiny-photos.onnx", "encoder-tiny-texts.onnx", "tokenizer-tiny-texts.json"} < set(names)
    for name in names:
        damaged = Path(shutil.copytree(bundle, tmp_path / name))
        content = bytearray((damaged / name).read_bytes())
        content[int(position * len(content)) if position > 0 else int(position)] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name}.*changed or cut short"):
            read(damaged)


def test_bundle_states_origin_and_licence_and_has_a_format_of_its_own(bundle: Path) -> None:
    manifest = read(bundle).manifest
    assert manifest.format == 5
    encoder = manifest.encoders["tiny-photos"]
    assert (encoder.licence, encoder.origin, encoder.size) == ("MIT", "a random network", FEATURES)
    assert "| tiny-photos | a random network | MIT | 12 |" in (bundle / "README.md").read_text()
    assert not [name for name in (bundle / MANIFEST).read_text().split('"') if name.startswith("/")], "a path of this machine"


def test_golden_files_find_a_changed_preprocessing(bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    fields = json.loads((damaged / MANIFEST).read_text())
    fields["encoders"]["tiny-photos"]["preprocessing"]["resize"] = 20
    (damaged / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match="golden examples differ"):
        Runtime.load(damaged, threads=1).replay_golden()


def change_size(fields: dict[str, Any]) -> None:
    fields["encoders"]["tiny-photos"]["size"] = 3


def remove_encoder(fields: dict[str, Any]) -> None:
    del fields["encoders"]["tiny-texts"]


def remove_tokenizer(fields: dict[str, Any]) -> None:
    del fields["files"]["tokenizer-tiny-texts.json"]


def enlarge_tokenizer(fields: dict[str, Any]) -> None:
    fields["files"]["tokenizer-tiny-texts.json"]["bytes"] = 1 << 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_size, "computes 3 numbers of a value of kind image; modality photo has 12"),
        (remove_encoder, "modality title has the encoder 'tiny-texts', which is missing"),
        (remove_tokenizer, r"no hash for \['tokenizer-tiny-texts.json'\]"),
        (enlarge_tokenizer, "1,073,741,824 bytes, 33,554,432 are allowed"),
    ],
)
def test_manifest_that_does_not_fit_its_encoders_is_refused(bundle: Path, tmp_path: Path, change: Any, message: str) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    fields = json.loads((damaged / MANIFEST).read_text())
    change(fields)
    (damaged / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=message):
        read(damaged)


def test_two_modalities_share_one_network(bundle: Path) -> None:
    opened = read(bundle)
    assert sorted(name for name in opened.manifest.files if name.startswith("encoder-")) == [
        "encoder-tiny-photos.onnx",
        "encoder-tiny-texts.onnx",
    ]
    runtime = Runtime(opened, threads=1)
    assert runtime.encoders["photo"] is runtime.encoders["back"]


@pytest.mark.usefixtures("bundle")
def test_column_may_be_features_and_pixels(folder: Path) -> None:
    """A second modality without encoder on the same column has pictures to generate."""
    thumbnail = '[[modalities]]\nname = "thumbnail"\nkind = "image"\nchannels = 3\nheight = 8\nwidth = 8\n'
    config = (folder / "articles.toml").read_text().replace("[data]", f"{thumbnail}[data]", 1)
    (folder / "both.toml").write_text(config.replace('photo = "photo"', 'photo = "photo", thumbnail = "photo"'))
    batch = next(load(config_file.read(folder / "both.toml"), "train").batches(0, 8, 0))
    assert batch.arrays["thumbnail"].shape == (8, 3, 8, 8)
    assert batch.arrays["photo"].shape == (8, FEATURES)


@pytest.mark.usefixtures("bundle")
def test_configuration_of_products_fits_rows_of_its_columns(folder: Path, tmp_path: Path) -> None:
    """fashion-encoded.toml, with small networks instead of the named ones."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(60):
        colour = list(COLOURS)[number % 3]
        row = {"image": photograph(colour, generator), "title": f"a new {colour} cup", "colour": colour}
        row |= {name: f"{name} {number % 2}" for name in ("gender", "category", "subcategory", "article", "season", "usage")}
        rows.append({**row, "year": 2010.0 + number % 4, "split": "train" if number < 40 else "test"})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "fashion.parquet")
    text = (CONFIGS / "fashion-encoded.toml").read_text()
    text = text.replace('"fashion.toml"', f'"{CONFIGS / "fashion.toml"}"')
    text = text.replace('"efficientnet-lite0"', f'"{folder / "tiny-photos"}"').replace(
        '"all-minilm-l6-v2"', f'"{folder / "tiny-texts"}"'
    )
    text = text.replace("[data]", f'[data]\nrows_per_epoch = 40\ncache = "{tmp_path / "cache"}"', 1)
    (tmp_path / "products.toml").write_text(text)
    run("check", str(tmp_path / "products.toml"), "--data", str(tmp_path))


@pytest.mark.skipif(not all(package.is_installed for package in PACKAGES.values()), reason="needs the packages of the networks")
def test_real_networks_of_packages(rows: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "articles.parquet", tmp_path)
    made = make_bundle(tmp_path)
    assert set(read(made).manifest.encoders) == set(PACKAGES)
    with running(CONCORD_BUNDLE=str(made)) as service:
        response = service.client.post("/embed", files={"photo": ("p.jpg", rows[1]["photo"]), "title": (None, "a red cup")})
        assert response.status_code == 200, response.text
    for name in read(made).manifest.encoders.values():
        assert onnx.load(made / name.graph).opset_import[0].version == 18
