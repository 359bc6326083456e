"""The command embed-dataset, over the very file that the bundle was trained on: every row is embedded, as in a request."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from concord.service import cli
from concord.training.cli import app
from tests.support.bulk import run_serially
from tests.support.images import to_base64
from tests.support.server import running
from tests.support.shop import COLOURS, SHAPES, photo

pytestmark = pytest.mark.slow  # a model is trained

ROWS = 60
BRANDS = ["acme", "never", "zenith"]
TITLES = ["a {} cup", "the {} cup", " "]
CONFIG = """
name = "forms"
threads = 1
modalities = [
  { name = "photo", kind = "image", channels = 3, height = 8, width = 8 },
  { name = "title", kind = "text", unit = "word", length = 4 },
  { name = "motto", kind = "text", length = 4 },
  { name = "brand", kind = "categorical" },
  { name = "grade", kind = "categorical" },
  { name = "year", kind = "vector", size = 1 },
  { name = "sold", kind = "vector", size = 1 },
  { name = "size", kind = "vector", size = 2 },
  { name = "marks", kind = "binary", attributes = ["new", "red"] },
]
network = { latent = 4, features = 8, width = 2, hidden = 8 }
joint = { epochs = 1, batch_size = 16 }
refiner = { epochs = 1, batch_size = 16, steps = 1 }
align = { epochs = 1, batch_size = 16 }
[data]
folder = "FOLDER"
pairing = "row"
[[data.sources]]
train = "articles.parquet"
held_out = 0.2
licence = "generated"
[data.sources.columns]
photo = "picture"
title = "titles"
motto = "motto"
brand = "brand"
grade = "grade"
year = "year"
sold = "sold"
size = ["width", "height, cm"]
marks = ["new", "red"]
"""
COLUMNS = [
    "photo=picture",
    "title=titles",
    "motto=motto",
    "brand=brand",
    "grade=grade",
    "year=year",
    "sold=sold",
    "size=width",
    "size=height, cm",
    "marks=new,red",
]


def articles() -> list[dict[str, Any]]:
    """Return rows as they are in a request. A modality that a row lacks is left out. Every row has an id."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        colour, shape = list(COLOURS)[generator.integers(3)], int(generator.integers(len(SHAPES)))
        row: dict[str, Any] = {
            "photo": photo(colour, shape),
            "title": f"a {colour} {SHAPES[shape]}",
            "motto": colour[:3],
            "brand": BRANDS[2 * (shape % 2)],
            "grade": str(3 + 4 * (shape % 3)),
            "year": 2000 + shape,
            "sold": shape % 2,
            "size": generator.normal(10, 2, 2).tolist(),
            "marks": {"new": bool(shape % 2), "red": colour == "red"},
        }
        absent = generator.permutation(list(row))[: generator.integers(0, len(row))]
        rows.append({name: value for name, value in row.items() if name not in absent})
    return rows


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the rows in the forms that files have: pictures by path, several texts, blank texts, a ClassLabel, class numbers
    without names, single numbers and truth values, several columns."""
    (folder / "pictures").mkdir()

    def picture(number: int, content: bytes | None) -> Any:
        if content is None:
            return {"bytes": None, "path": None}
        (folder / "pictures" / f"{number}.png").write_bytes(content)
        return {"bytes": None, "path": f"pictures/{number}.png"}

    def column(name: str, form: Callable[[Any], Any], kind: Any, absent: Any = None) -> pa.Array:
        return pa.array([form(row[name]) if name in row else absent for row in rows], kind)

    table = {
        "picture": pa.array(
            [picture(number, row.get("photo")) for number, row in enumerate(rows)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "titles": column("title", lambda title: ["", title, "another cup"], pa.list_(pa.string()), [" "]),
        "motto": column("motto", str, pa.string(), "  "),
        "brand": column("brand", BRANDS.index, pa.int64(), -1),
        "grade": column("grade", int, pa.int16()),
        "year": column("year", int, pa.int32()),
        "sold": column("sold", bool, pa.bool_()),
        "width": column("size", lambda size: size[0], pa.float64()),
        "height, cm": column("size", lambda size: size[1], pa.float64()),
        "new": column("marks", lambda marks: marks["new"], pa.bool_()),
        "red": column("marks", lambda marks: marks["red"], pa.float32(), float("nan")),
    }
    features = {"info": {"features": {"brand": {"names": BRANDS, "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)}
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), folder / "articles.parquet", row_group_size=25)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return articles()


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file, and the bundle that is trained on it."""
    folder = tmp_path_factory.mktemp("forms")
    write(rows, folder)
    (folder / "forms.toml").write_text(CONFIG.replace("FOLDER", str(folder)))
    for command in ("fit", "export"):
        result = CliRunner().invoke(app, [command, str(folder / "forms.toml"), "--out", str(folder / "run")])
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def embed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, with its parts one after the other in this process in place of Ray's workers."""

    run_serially(monkeypatch)

    def embed(*columns: str) -> Result:
        options = [option for column in columns for option in ("--column", column)]
        command = ["embed-dataset", str(folder / "articles.parquet"), str(tmp_path / "output")]
        return CliRunner().invoke(cli.app, [*command, "--bundle", str(folder / "run" / "bundle"), *options])

    return embed


def test_embed_dataset_over_the_training_file_embeds_every_row_like_a_request(
    folder: Path, rows: list[dict[str, Any]], embed: Callable[..., Result], tmp_path: Path
) -> None:
    result = embed(*COLUMNS)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if not line.startswith("embedding ")] == []
    assert result.stdout == f"{ROWS} rows in 3 files, 0 without embedding; 0 files were there already\n"
    table = pq.read_table(tmp_path / "output")
    assert table["error"].null_count == ROWS
    items = [{**row, "photo": to_base64(row["photo"])} if "photo" in row else row for row in rows]
    expected = []
    with running(CONCORD_BUNDLE=str(folder / "run" / "bundle")) as service:
        client: httpx.Client = service.client
        for start in range(0, ROWS, 20):
            response = client.post("/embed", json={"inputs": items[start : start + 20]})
            assert response.status_code == 200, response.text
            expected += response.json()["data"]
    assert [set(one["modalities"]) for one in expected] == [set(row) for row in rows]
    np.testing.assert_allclose(table["embedding"].to_pylist(), [one["embedding"] for one in expected], atol=1e-5)


def test_embed_dataset_without_any_embedding_exits_with_status_1_and_the_reason(embed: Callable[..., Result]) -> None:
    result = embed("brand=motto")
    assert result.exit_code == 1
    assert result.stdout == f"{ROWS} rows in 3 files, {ROWS} without embedding; 0 files were there already\n"
    assert "no row has an embedding. The first: bad_class: brand: " in result.stderr
