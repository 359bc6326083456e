"""Eight modalities of all kinds, half of their values missing: trained, exported, served, and queried with every subset.

Some have the names of attributes of ``nn.ModuleDict`` and of values of the graphs. The file holds them in the forms that users'
files have, and a bulk job over that very file gives the embeddings of requests.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from concord.client.client import Client
from concord.client.responses import InvalidRequestError
from concord.model.bundle import read
from concord.model.runtime import Runtime
from concord.model.vae.export import PARITY_TOLERANCE
from concord.service.batch.dataset import BatchJob, Embedder, plan
from concord.training.cli import app
from tests.support.images import to_base64
from tests.support.server import running
from tests.support.shop import BRANDS, COLOURS, SHAPES, photo

pytestmark = pytest.mark.slow  # a model is trained

CONFIG = """
name = "all-kinds"
threads = 1
{modalities}
[data]
folder = "{folder}"
pairing = "row"
[[data.sources]]
train = "rows.parquet"
held_out = 0.25
columns = {{ {columns} }}
licence = "generated"
[network]
latent = 4
features = 8
width = 2
hidden = 8
[joint]
epochs = 2
batch_size = 16
[refiner]
epochs = 1
batch_size = 16
steps = 1
[align]
epochs = 1
batch_size = 16
"""
MODALITIES = {
    "photo": 'kind = "image"\nchannels = 3\nheight = 16\nwidth = 16',
    "scan": 'kind = "image"\nchannels = 2\nheight = 4\nwidth = 6\nlikelihood = "gaussian"',
    "title": 'kind = "text"\nunit = "word"\nlength = 4',
    "code": 'kind = "text"\nlength = 3',
    "brand": 'kind = "categorical"',
    "mean": 'kind = "vector"\nsize = 3',
    "training": 'kind = "vector"\nsize = 2\nlikelihood = "laplace"',
    "items": 'kind = "binary"\nattributes = ["tall", "red"]',
}
COLUMNS: dict[str, str | tuple[str, ...]] = {
    **{name: name for name in MODALITIES},
    "mean": ("width, cm", "height", "depth"),
    "items": ("tall", "red"),
}
CLASS_NAMES = ["acme", "never", "none", "zenith"]


def article(generator: np.random.Generator) -> dict[str, Any]:
    """Return a complete row."""
    colour, shape = list(COLOURS)[generator.integers(3)], int(generator.integers(4))
    return {
        "photo": photo(colour, shape),
        "scan": np.full((2, 4, 6), shape / 4).tolist(),
        "title": f"a {colour} {SHAPES[shape]}",
        "code": f"{colour[0]}{shape}",
        "brand": BRANDS[colour],
        "mean": (10 * shape + generator.normal(size=3)).tolist(),
        "training": generator.normal(size=2).astype(np.float32).tolist(),
        "items": [int(shape > 1), int(colour == "red")],
    }


def write_table(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the rows in the forms that files have: pictures by path and as nested lists from 0 to 255 with the channels last,
    several texts, class numbers with names, truth values as numbers with gaps, several columns for one vector."""
    (folder / "写真").mkdir()
    photos, titles = list[Any](), list[Any]()
    for number, row in enumerate(rows):
        file = f"写真/#{number} 100%.png"
        if row["photo"] is not None:
            (folder / file).write_bytes(row["photo"])
        by_path = {"bytes": row["photo"] if number % 2 else None, "path": file}
        photos.append({"bytes": None, "path": None} if row["photo"] is None and number % 2 else row["photo"] and by_path)
        titles.append(row["title"] and [" ", row["title"], " ".join(reversed(row["title"].split()))][number % 2 :])
    table: dict[str, pa.Array] = {
        "photo": pa.array(photos, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "scan": pa.array([row["scan"] and (255 * np.array(row["scan"]).transpose(1, 2, 0)).tolist() for row in rows]),
        "title": pa.array(titles, pa.large_list(pa.large_string())),
        "code": pa.array([row["code"] or "" for row in rows]).dictionary_encode(),
        "brand": pa.array([CLASS_NAMES.index(row["brand"]) if row["brand"] else -1 for row in rows]),
        "training": pa.array([row["training"] for row in rows], pa.list_(pa.float32(), 2)),
        "pairs": pa.array([[("a", 1)]] * len(rows), pa.map_(pa.string(), pa.int8())),
    }
    for name in ("mean", "items"):
        for index, column in enumerate(COLUMNS[name]):
            table[column] = pa.array([row[name] and float(row[name][index]) for row in rows])
    features = {"info": {"features": {"brand": {"names": CLASS_NAMES, "_type": "ClassLabel"}}}}
    columns = pa.table(table).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(columns, folder / "rows.parquet", row_group_size=33)


def to_json(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is present of a row as it is in a request."""
    present = {name: value for name, value in row.items() if value is not None}
    if "photo" in present:
        present["photo"] = to_base64(row["photo"])
    if "scan" in present:
        data = to_base64(np.array(row["scan"], dtype="<f4").tobytes())
        present["scan"] = {"data": data, "shape": [2, 4, 6], "dtype": "float32"}
    return present


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    rows = [article(generator) for _ in range(80)]
    for row in rows:
        for name in generator.permutation(list(MODALITIES))[: generator.integers(0, 7)]:
            row[name] = None
    return rows


@pytest.fixture(scope="module")
def bundle(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_table(rows, folder)
    config = folder / "kinds.toml"
    tables = "\n".join(f'[[modalities]]\nname = "{name}"\n{fields}' for name, fields in MODALITIES.items())
    columns = ", ".join(f"{name} = {json.dumps(columns)}" for name, columns in COLUMNS.items())
    config.write_text(CONFIG.format(modalities=tables, folder=folder, columns=columns))
    for command in ("fit", "export"):
        result = CliRunner().invoke(app, [command, str(config), "--out", str(folder / "run")])
        assert result.exit_code == 0, result.output
    return folder / "run" / "bundle"


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[httpx.Client]:
    with running(CONCORD_BUNDLE=str(bundle)) as service:
        yield service.client


def test_bulk_job_over_the_training_file_equals_requests(
    bundle: Path, client: httpx.Client, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    source, output = str(bundle.parents[1] / "rows.parquet"), str(tmp_path / "output")
    job = BatchJob(bundle, COLUMNS)
    parts, _ = plan(job, source, output)
    assert len(parts) == 3
    embedder = Embedder(job, source, output)
    assert [tuple(embedder.process(part)) for part in parts] == [(33, 0, ""), (33, 0, ""), (14, 0, "")]
    embeddings = pq.read_table(output)["embedding"].to_pylist()
    items = [to_json(row) for row in rows]
    responses = [client.post("/embed", json={"inputs": items[start : start + 32]}).json() for start in range(0, 80, 32)]
    expected = [result["embedding"] for response in responses for result in response["data"]]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_bundle_holds_inferred_schema_and_metrics(bundle: Path) -> None:
    manifest = read(bundle).manifest
    kinds = {m.name: m for m in manifest.modalities}
    assert manifest.format == 4  # because of the texts of words
    assert list(kinds) == list(MODALITIES)
    assert set(kinds["title"].vocabulary) == {"a", *COLOURS, *SHAPES}
    assert kinds["code"].alphabet == " 0123bgr\ufffd"
    assert kinds["brand"].classes == ("acme", "none", "zenith")
    assert kinds["mean"].mean is not None
    assert {"retrieval", "attributes", "refinement"} <= set(manifest.metrics)
    assert "probe" not in manifest.metrics
    assert Runtime.load(bundle, threads=1).replay_golden(PARITY_TOLERANCE) <= PARITY_TOLERANCE


def test_each_of_the_255_subsets_is_embedded_generated_from_and_refined(client: httpx.Client) -> None:
    row = to_json(article(np.random.default_rng(1)))
    names = list(MODALITIES)
    subsets = [[name for bit, name in enumerate(names) if code >> bit & 1] for code in range(1, 256)]
    items = [{name: row[name] for name in subset} for subset in subsets]
    embeddings = []
    for start in range(0, len(items), 32):
        chunk = items[start : start + 32]
        embedded = client.post("/embed", json={"inputs": chunk, "refine": {"steps": 1}})
        assert embedded.status_code == 200, embedded.text
        generated = client.post("/cross-generate", json={"inputs": chunk, "targets": names, "latent": "mean"})
        assert generated.status_code == 200, generated.text
        results = zip(subsets[start : start + 32], embedded.json()["data"], generated.json()["data"], strict=True)
        for subset, embedding, generation in results:
            assert embedding["modalities"] == generation["modalities"] == subset
            assert embedding["refinement"]["objective"] == ("elbo" if len(subset) == 8 else "observed")
            assert embedding["refinement"]["after"] >= embedding["refinement"]["before"]
            assert list(generation["generated"]) == names
            embeddings.append(embedding["embedding"])
        assert set(embedded.json()["data"][0]) == {
            "object",
            "index",
            "id",
            "embedding",
            "log_var",
            "modalities",
            "refinement",
        }
    matrix = np.array(embeddings)
    assert matrix.shape == (255, 4)
    assert np.isfinite(matrix).all()
    assert len(np.unique(matrix.round(6), axis=0)) == 255, "two subsets have the same embedding"


def test_embedding_does_not_depend_on_other_items(client: httpx.Client) -> None:
    row = to_json(article(np.random.default_rng(2)))
    items = [{"title": row["title"]}, row, {"brand": row["brand"], "scan": row["scan"]}]
    results = client.post("/embed", json={"inputs": items}).json()["data"]
    for item, result in zip(items, results, strict=True):
        expected = client.post("/embed", json={"inputs": [item]}).json()["data"][0]
        np.testing.assert_allclose(result["embedding"], expected["embedding"], atol=1e-5)


def test_every_kind_is_generated_in_its_json_form(client: httpx.Client) -> None:
    generated = client.post("/cross-generate", json={"inputs": [{"title": "a red cup"}]}).json()["data"][0]["generated"]
    (image,), (scan,), (code,), (brand,) = (generated[name] for name in ("photo", "scan", "code", "brand"))
    assert image["media_type"] == "image/png"
    assert scan["shape"] == [2, 4, 6]
    assert set(code) == {"text"}
    assert brand["class"] == max(brand["data"], key=brand["data"].get)
    assert sum(brand["data"].values()) == pytest.approx(1)
    assert len(generated["mean"][0]["data"]) == 3
    assert set(generated["items"][0]["data"]) == {"tall", "red"}
    item = {"scan": scan, "brand": brand["class"], "photo": image["data"]}
    assert client.post("/embed", json={"inputs": [item]}).status_code == 200, "a generated value is not accepted as input"


def test_openapi_document_describes_every_kind_and_its_examples_work(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    properties = document["components"]["schemas"]["Input"]["properties"]
    assert set(properties) == {"id", *MODALITIES}
    assert {"enum": ["acme", "none", "zenith"]} in properties["brand"]["anyOf"]
    for path in ("/embed", "/cross-generate"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200
    modalities = client.get("/v1/models").json()["data"][0]["modalities"]
    assert [(m["name"], m["kind"]) for m in modalities] == [
        (name, json.loads(fields.split("\n")[0].removeprefix("kind = "))) for name, fields in MODALITIES.items()
    ]


def test_forms_and_the_client_accept_every_kind(client: httpx.Client) -> None:
    row = article(np.random.default_rng(3))
    values = to_json(row)
    parts = {"photo": ("p.png", row["photo"]), "title": (None, row["title"]), "brand": (None, row["brand"])}
    parts |= {name: (None, json.dumps(values[name])) for name in ("scan", "mean", "training", "items")}
    form = client.post("/embed", files={**parts, "code": (None, row["code"])})
    assert form.status_code == 200, form.text
    assert form.json()["data"][0]["modalities"] == list(MODALITIES)
    with Client(str(client.base_url)) as concord:
        (result,) = concord.embed([{**values, "photo": row["photo"], "mean": np.array(row["mean"])}]).results
        np.testing.assert_allclose(result.embedding, form.json()["data"][0]["embedding"], atol=1e-5)
        (result,) = concord.cross_generate({"title": "a blue lamp"}, targets=["brand", "scan"]).results
        assert set(result.generated["brand"][0]) == {"acme", "none", "zenith"}
        assert result.generated["scan"][0].shape == (2, 4, 6)
        with pytest.raises(InvalidRequestError, match="the classes are 'acme', 'none', 'zenith'"):
            concord.embed({"brand": "tiffany"})


def test_unknown_words_are_accepted_and_too_many_words_are_not(client: httpx.Client) -> None:
    texts = ["a red cup", "a red spaceship", "a red teapot", "utterly unknown"]
    rows = client.post("/embed", json={"inputs": [{"title": text} for text in texts]}).json()["data"]
    known, spaceship, teapot, all_unknown = (row["embedding"] for row in rows)
    assert spaceship == pytest.approx(teapot, abs=1e-6), "two unknown words differ"
    assert known != pytest.approx(spaceship, abs=1e-6)
    assert all_unknown != pytest.approx(spaceship, abs=1e-6)
    rejected = client.post("/embed", json={"inputs": [{"title": "a red cup and more"}]})
    assert (rejected.status_code, rejected.json()["errors"][0]["code"]) == (422, "bad_text")
    assert "5 words, at most 4 are allowed" in rejected.json()["detail"]
