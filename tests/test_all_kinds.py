"""Eight modalities of all kinds, half of them missing: trained, exported, served, and asked with every one of their subsets."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from model.bundle import read
from model.runtime import Runtime
from model.vae.export import PARITY_TOLERANCE
from service.client import Client
from service.replies import InvalidRequestError
from tests.server import running
from tests.training.shop import BRANDS, COLOURS, SHAPES, photo
from training.__main__ import app

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
licence = "drawn"
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
    "measures": 'kind = "vector"\nsize = 3',
    "features": 'kind = "vector"\nsize = 2\nlikelihood = "laplace"',
    "traits": 'kind = "binary"\nattributes = ["tall", "red"]',
}


def article(generator: np.random.Generator) -> dict[str, Any]:
    """As it stands in a Parquet file."""
    colour, shape = list(COLOURS)[generator.integers(3)], int(generator.integers(4))
    return {
        "photo": photo(colour, shape),
        "scan": np.full((2, 4, 6), shape / 4).tolist(),
        "title": f"a {colour} {SHAPES[shape]}",
        "code": f"{colour[0]}{shape}",
        "brand": BRANDS[colour],
        "measures": (10 * shape + generator.normal(size=3)).tolist(),
        "features": generator.normal(size=2).tolist(),
        "traits": [int(shape > 1), int(colour == "red")],
    }


def on_the_wire(row: dict[str, Any]) -> dict[str, Any]:
    """As it stands in a request."""
    scan = base64.b64encode(np.array(row["scan"], dtype="<f4").tobytes()).decode()
    wire = {"photo": base64.b64encode(row["photo"]).decode(), "scan": {"data": scan, "shape": [2, 4, 6], "dtype": "float32"}}
    return {**row, **wire}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    rows = [article(generator) for _ in range(80)]
    for row in rows:
        for name in generator.permutation(list(MODALITIES))[: generator.integers(0, 7)]:
            row[name] = None
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    config = folder / "kinds.toml"
    tables = "\n".join(f'[[modalities]]\nname = "{name}"\n{fields}' for name, fields in MODALITIES.items())
    columns = ", ".join(f'{name} = "{name}"' for name in MODALITIES)
    config.write_text(CONFIG.format(modalities=tables, folder=folder, columns=columns))
    for command in ("fit", "export"):
        done = CliRunner().invoke(app, [command, str(config), "--out", str(folder / "run")])
        assert done.exit_code == 0, done.output
    return folder / "run" / "bundle"


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[httpx.Client]:
    with running(CONCORD_BUNDLE=str(bundle)) as service:
        yield service.client


def test_the_bundle_holds_what_was_learned(bundle: Path) -> None:
    manifest = read(bundle).manifest
    kinds = {m.name: m for m in manifest.modalities}
    assert manifest.format == 2
    assert list(kinds) == list(MODALITIES)
    assert set(kinds["title"].vocabulary) == {"a", *COLOURS, *SHAPES}
    assert kinds["code"].alphabet == " 0123bgr\ufffd"
    assert kinds["brand"].classes == ("acme", "none", "zenith")
    assert kinds["measures"].mean is not None
    assert {"retrieval", "attributes", "refinement"} <= set(manifest.metrics)
    assert "probe" not in manifest.metrics
    assert Runtime.load(bundle, threads=1).replay_golden(PARITY_TOLERANCE) <= PARITY_TOLERANCE


def test_each_of_the_255_subsets_is_embedded_completed_and_refined(client: httpx.Client) -> None:
    row = on_the_wire(article(np.random.default_rng(1)))
    names = list(MODALITIES)
    subsets = [[name for bit, name in enumerate(names) if code >> bit & 1] for code in range(1, 256)]
    items = [{name: row[name] for name in subset} for subset in subsets]
    embeddings = []
    for start in range(0, len(items), 32):
        chunk = items[start : start + 32]
        body = {"inputs": chunk, "refine": {"steps": 1}}
        embedded = client.post("/embed", json=body)
        assert embedded.status_code == 200, embedded.text
        made = client.post("/cross-generate", json={"inputs": chunk, "targets": names, "latent": "mean"})
        assert made.status_code == 200, made.text
        for subset, one, other in zip(subsets[start : start + 32], embedded.json()["data"], made.json()["data"], strict=True):
            assert one["modalities"] == other["modalities"] == subset
            assert one["refinement"]["objective"] == ("elbo" if len(subset) == 8 else "observed")
            assert one["refinement"]["after"] >= one["refinement"]["before"]
            assert list(other["generated"]) == names
            embeddings.append(one["embedding"])
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
    assert len(np.unique(matrix.round(6), axis=0)) == 255  # each subset says something else


def test_a_row_answers_the_same_alone_and_among_all_subsets(client: httpx.Client) -> None:
    row = on_the_wire(article(np.random.default_rng(2)))
    items = [{"title": row["title"]}, row, {"brand": row["brand"], "scan": row["scan"]}]
    together = client.post("/embed", json={"inputs": items}).json()["data"]
    for item, one in zip(items, together, strict=True):
        alone = client.post("/embed", json={"inputs": [item]}).json()["data"][0]
        np.testing.assert_allclose(alone["embedding"], one["embedding"], atol=1e-5)


def test_every_kind_is_generated_in_its_wire_form(client: httpx.Client) -> None:
    generated = client.post("/cross-generate", json={"inputs": [{"title": "a red cup"}]}).json()["data"][0]["generated"]
    (photo_,), (scan,), (code,), (brand,) = (generated[name] for name in ("photo", "scan", "code", "brand"))
    assert photo_["media_type"] == "image/png"
    assert scan["shape"] == [2, 4, 6]
    assert set(code) == {"text"}
    assert brand["class"] == max(brand["data"], key=brand["data"].get)
    assert sum(brand["data"].values()) == pytest.approx(1)
    assert len(generated["measures"][0]["data"]) == 3
    assert set(generated["traits"][0]["data"]) == {"tall", "red"}
    back = {"scan": scan, "brand": brand["class"], "photo": photo_["data"]}
    assert client.post("/embed", json={"inputs": [back]}).status_code == 200


def test_the_document_describes_every_kind_and_its_examples_work(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    described = document["components"]["schemas"]["Input"]["properties"]
    assert set(described) == {"id", *MODALITIES}
    assert {"enum": ["acme", "none", "zenith"]} in described["brand"]["anyOf"]
    for path in ("/embed", "/cross-generate"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200
    taken = client.get("/v1/models").json()["data"][0]["modalities"]
    assert [(m["name"], m["kind"]) for m in taken] == [
        (name, json.loads(fields.split("\n")[0].removeprefix("kind = "))) for name, fields in MODALITIES.items()
    ]


def test_forms_and_the_client_take_every_kind(client: httpx.Client) -> None:
    row = article(np.random.default_rng(3))
    wire = on_the_wire(row)
    parts = {"photo": ("p.png", row["photo"]), "title": (None, row["title"]), "brand": (None, row["brand"])}
    parts |= {name: (None, json.dumps(wire[name])) for name in ("scan", "measures", "features", "traits")}
    form = client.post("/embed", files={**parts, "code": (None, row["code"])})
    assert form.status_code == 200, form.text
    assert form.json()["data"][0]["modalities"] == list(MODALITIES)
    with Client(str(client.base_url)) as own:
        (found,) = own.embed([{**wire, "photo": row["photo"], "measures": np.array(row["measures"])}]).results
        np.testing.assert_allclose(found.embedding, form.json()["data"][0]["embedding"], atol=1e-5)
        (made,) = own.cross_generate({"title": "a blue lamp"}, targets=["brand", "scan"]).results
        assert set(made.generated["brand"][0]) == {"acme", "none", "zenith"}
        assert made.generated["scan"][0].shape == (2, 4, 6)
        with pytest.raises(InvalidRequestError, match="the classes are 'acme', 'none', 'zenith'"):
            own.embed({"brand": "Acme"})


def test_words_that_nobody_trained_on_are_taken(client: httpx.Client) -> None:
    texts = ["a red cup", "a red spaceship", "a red teapot", "utterly unknown"]
    rows = client.post("/embed", json={"inputs": [{"title": text} for text in texts]}).json()["data"]
    known, spaceship, teapot, nothing = (row["embedding"] for row in rows)
    assert spaceship == pytest.approx(teapot, abs=1e-6)  # one unknown word is like another
    assert known != pytest.approx(spaceship, abs=1e-6)
    assert nothing != pytest.approx(spaceship, abs=1e-6)
    refused = client.post("/embed", json={"inputs": [{"title": "a red cup and more"}]})
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "bad_text")
    assert "5 words, at most 4 are allowed" in refused.json()["detail"]
