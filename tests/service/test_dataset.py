"""Parquet in, Parquet with embeddings out: the same numbers as over HTTP, whole files only, each row once."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from model.bundle import Bundle
from model.modality import CategoricalModality, ImageModality
from model.runtime import Runtime
from service.app import create
from service.dataset import Embedder, Job, JobError, _column, plan
from service.settings import Settings

COLUMNS = {"image": "picture", "text": "caption", "vector": "sensors", "binary": "marks"}
TARGETS = ("image", "text", "vector", "binary")


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def rows(count: int) -> pa.Table:
    """Complete rows, rows that lack something, and at 5 one with a broken picture, at 6 one with nothing at all."""
    return pa.table(
        {
            "number": list(range(count)),
            "picture": [
                {"bytes": b"no picture" if i == 5 else picture(i), "path": None} if i != 6 else None for i in range(count)
            ],
            "caption": ["abc" if i % 2 else None for i in range(count)],
            "sensors": [[0.5 * i] * 5 if i % 3 and i != 6 else None for i in range(count)],
            "marks": [[1, 0] if i % 4 == 1 else None for i in range(count)],
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "more").mkdir(parents=True)
    pq.write_table(rows(10), folder / "a.parquet", row_group_size=4)
    pq.write_table(rows(10).slice(7), folder / "more" / "a.parquet")
    return folder


@pytest.fixture
def job(tiny_bundle: Bundle) -> Job:
    return Job(tiny_bundle.path, COLUMNS, TARGETS, refine_steps=2, seed=3, max_batch=3)


def embed(job: Job, source: Path, output: Path) -> pa.Table:
    parts, _ = plan(job, str(source), str(output))
    embedder = Embedder(job, str(source), str(output))
    for part in parts:
        embedder.do(part)
    return pq.read_table(output).sort_by("number")


def test_answers_are_those_of_the_service(job: Job, tiny_bundle: Bundle, source: Path, tmp_path: Path) -> None:
    table = embed(job, source / "a.parquet", tmp_path / "output")
    assert table.column_names == [*rows(1).column_names, "embedding", *(f"generated_{m}" for m in TARGETS), "error"]
    app = create([Runtime.load(tiny_bundle.path)], Settings(bundle=str(tiny_bundle.path)))
    with TestClient(app) as client:
        for row in table.to_pylist():
            if row["number"] in {5, 6}:
                assert row["embedding"] is None
                assert row["generated_text"] is None
                assert row["error"].startswith("bad_image: image: " if row["number"] == 5 else "wrong_type: no modality")
                continue
            assert row["error"] is None
            parts = {"image": ("x.png", row["picture"]["bytes"]), "options": (None, '{"seed": 3, "refine": {"steps": 2}}')}
            parts |= {"text": (None, row["caption"])} if row["caption"] else {}
            parts |= {"vector": (None, str(row["sensors"]))} if row["sensors"] else {}
            parts |= {"binary": (None, str(row["marks"]))} if row["marks"] else {}
            answer = client.post("/embed", files=parts).json()["data"][0]
            np.testing.assert_allclose(row["embedding"], answer["embedding"], atol=1e-5)
            options = f'{{"seed": 3, "refine": {{"steps": 2}}, "latent": "mean", "targets": {list(TARGETS)}}}'.replace("'", '"')
            generated = client.post("/cross-generate", files=parts | {"options": (None, options)}).json()["data"][0][
                "generated"
            ]
            assert row["generated_text"] == generated["text"][0]["text"]
            np.testing.assert_allclose(row["generated_vector"], generated["vector"][0]["data"], atol=1e-5)
            np.testing.assert_allclose(row["generated_binary"], list(generated["binary"][0]["data"].values()), atol=1e-5)
            assert Image.open(io.BytesIO(row["generated_image"]["bytes"])).size == (8, 8)


def test_what_is_there_is_not_done_again(job: Job, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    parts, total = plan(job, str(source), str(output))
    assert [part.file for part in parts] == ["a-00000.parquet", "a-00001.parquet", "a-00002.parquet", "more/a-00000.parquet"]
    Embedder(job, str(source), str(output)).do(parts[1])
    left, again = plan(job, str(source), str(output))
    assert left == [parts[0], *parts[2:]]
    assert again == total == 4
    assert embed(job, source, output)["number"].to_pylist() == sorted([*range(10), 7, 8, 9])
    assert plan(job, str(source), str(output))[0] == []


def test_a_part_done_twice_is_there_once(job: Job, source: Path, tmp_path: Path) -> None:
    """As when a worker dies between its last write and its answer."""
    parts, _ = plan(job, str(source), str(tmp_path / "output"))
    embedder = Embedder(job, str(source), str(tmp_path / "output"))
    assert embedder.do(parts[1]) == embedder.do(parts[1]) == (4, 2)
    assert pq.read_table(tmp_path / "output")["number"].to_pylist() == [4, 5, 6, 7]


def test_a_writer_that_is_cut_short_leaves_nothing(
    job: Job, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, _ = plan(job, str(source), str(tmp_path / "output"))

    def cut_short(_table: pa.Table, path: str, **_: object) -> None:
        Path(path).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pq, "write_table", cut_short)
        with pytest.raises(KeyboardInterrupt):
            Embedder(job, str(source), str(tmp_path / "output")).do(parts[0])
    assert plan(job, str(source), str(tmp_path / "output"))[0] == parts
    assert embed(job, source, tmp_path / "output").num_rows == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "another job"),
        ({"columns": {"image": "picture"}}, "another job"),
        ({"columns": {"photo": "picture"}}, "no modality photo: there are image, text, vector, binary"),
        ({"columns": {"image": "photo"}}, "no column photo"),
        ({"columns": {}}, "no column is named"),
        ({"targets": ("photo",)}, "no modality photo"),
    ],
)
def test_what_cannot_be_right_is_refused(
    job: Job, source: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    plan(job, str(source), str(tmp_path / "output"))
    with pytest.raises(JobError, match=message):
        plan(Job(**{**vars(job), **change}), str(source), str(tmp_path / "output"))


def test_a_source_may_grow_but_not_change(job: Job, source: Path, tmp_path: Path) -> None:
    embed(job, source, tmp_path / "output")
    pq.write_table(rows(3), source / "b.parquet")
    assert [part.file for part in plan(job, str(source), str(tmp_path / "output"))[0]] == ["b-00000.parquet"]
    pq.write_table(rows(9), source / "a.parquet")
    with pytest.raises(JobError, match=r"a\.parquet: changed"):
        plan(job, str(source), str(tmp_path / "output"))


def test_a_taken_column_and_an_empty_folder_are_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no Parquet files"):
        plan(job, str(tmp_path), str(tmp_path / "output"))
    pq.write_table(rows(1).append_column("error", pa.array(["x"])), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="column error already"):
        plan(job, str(tmp_path / "a.parquet"), str(tmp_path / "output"))


def test_classes_are_strings_and_pictures_that_no_file_holds_are_numbers() -> None:
    brand = CategoricalModality(name="brand", classes=("acme", "zenith"))
    assert _column(brand, [np.array([0.2, 0.8], np.float32), None]).to_pylist() == ["zenith", None]
    scan = ImageModality(name="scan", channels=2, height=2, width=2)
    numbers = np.linspace(0, 1, 8, dtype=np.float32)
    column = _column(scan, [None, numbers.reshape(scan.shape)])
    assert column.type == pa.list_(pa.float32(), 8)
    assert column.to_pylist() == [None, numbers.tolist()]
