"""Parquet in, Parquet with embeddings out: the same numbers as over HTTP, complete files only, each row once."""

import inspect
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from concord.model.bundle import Bundle
from concord.model.modality import CategoricalModality, ImageModality
from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.batch.dataset import (
    BatchJob,
    Done,
    Embedder,
    JobError,
    _column,
    class_names_from_options,
    columns_from_options,
    plan,
    reason_of_failure,
    resolve_columns,
    summary,
)
from concord.service.inference.scheduler import Scheduler
from concord.service.settings import Settings
from tests.support.images import noise_image

COLUMNS = {"image": "picture", "text": "caption", "vector": "sensors", "binary": "marks"}
TARGETS = ("image", "text", "vector", "binary")


def rows(count: int) -> pa.Table:
    """Return rows with all or some modalities; row 5 has an invalid image, and row 6 has no modality."""
    return pa.table(
        {
            "number": list(range(count)),
            "picture": [
                {"bytes": b"no image" if i == 5 else noise_image(i, (8, 8), "L"), "path": None} if i != 6 else None
                for i in range(count)
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
def job(tiny_bundle: Bundle) -> BatchJob:
    return BatchJob(tiny_bundle.path, COLUMNS, TARGETS, refine_steps=2, seed=3, max_batch=3)


def embed(job: BatchJob, source: Path, output: Path) -> pa.Table:
    parts, _ = plan(job, str(source), str(output))
    embedder = Embedder(job, str(source), str(output))
    for part in parts:
        embedder.process(part)
    return pq.read_table(output).sort_by("number")


def test_embed_dataset_returns_what_the_service_returns(
    job: BatchJob, tiny_bundle: Bundle, source: Path, tmp_path: Path
) -> None:
    table = embed(job, source / "a.parquet", tmp_path / "output")
    assert table.column_names == [*rows(1).column_names, "embedding", *(f"generated_{m}" for m in TARGETS), "error"]
    app = create([Runtime.load(tiny_bundle.path)], Settings(bundle=str(tiny_bundle.path)))
    with TestClient(app) as client:
        for row in table.to_pylist():
            if row["number"] in {5, 6}:
                assert row["embedding"] is None
                assert row["generated_text"] is None
                assert row["error"].startswith(
                    "bad_image: image: " if row["number"] == 5 else "wrong_type: every modality is absent"
                )
                continue
            assert row["error"] is None
            parts = {"image": ("x.png", row["picture"]["bytes"]), "options": (None, '{"seed": 3, "refine": {"steps": 2}}')}
            parts |= {"text": (None, row["caption"])} if row["caption"] else {}
            parts |= {"vector": (None, str(row["sensors"]))} if row["sensors"] else {}
            parts |= {"binary": (None, str(row["marks"]))} if row["marks"] else {}
            result = client.post("/embed", files=parts).json()["data"][0]
            np.testing.assert_allclose(row["embedding"], result["embedding"], atol=1e-5)
            options = f'{{"seed": 3, "refine": {{"steps": 2}}, "latent": "mean", "targets": {list(TARGETS)}}}'.replace("'", '"')
            body = client.post("/cross-generate", files=parts | {"options": (None, options)}).json()
            generated = body["data"][0]["generated"]
            assert row["generated_text"] == generated["text"][0]["text"]
            np.testing.assert_allclose(row["generated_vector"], generated["vector"][0]["data"], atol=1e-5)
            np.testing.assert_allclose(row["generated_binary"], list(generated["binary"][0]["data"].values()), atol=1e-5)
            assert Image.open(io.BytesIO(row["generated_image"]["bytes"])).size == (8, 8)


def test_embed_dataset_refines_batches_of_more_rows_than_the_service(job: BatchJob, tmp_path: Path) -> None:
    count = inspect.signature(Scheduler).parameters["max_rows"].default + 1
    table = pa.table({"number": range(count), "sensors": [[i / count] * 5 for i in range(count)]})
    pq.write_table(table, tmp_path / "a.parquet")
    job = replace(job, columns={"vector": "sensors"}, targets=(), refine_steps=1, max_batch=count)
    embedded = embed(job, tmp_path / "a.parquet", tmp_path / "output")
    assert embedded["error"].null_count == count
    assert embedded["embedding"].null_count == 0


def test_plan_leaves_out_finished_parts(job: BatchJob, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    parts, count = plan(job, str(source), str(output))
    assert [part.file for part in parts] == ["a-00000.parquet", "a-00001.parquet", "a-00002.parquet", "more/a-00000.parquet"]
    Embedder(job, str(source), str(output)).process(parts[1])
    remaining, count_again = plan(job, str(source), str(output))
    assert remaining == [parts[0], *parts[2:]]
    assert count_again == count == 4
    assert embed(job, source, output)["number"].to_pylist() == sorted([*range(10), 7, 8, 9])
    assert plan(job, str(source), str(output))[0] == []


def test_part_processed_twice_is_written_once(job: BatchJob, source: Path, tmp_path: Path) -> None:
    """This happens when a worker dies between writing a part and reporting it."""
    parts, _ = plan(job, str(source), str(tmp_path / "output"))
    embedder = Embedder(job, str(source), str(tmp_path / "output"))
    first, again = embedder.process(parts[1]), embedder.process(parts[1])
    assert (first.rows, first.failed) == (4, 2)
    assert first == again
    assert first.reason.startswith("bad_image: image: not a PNG")
    assert pq.read_table(tmp_path / "output")["number"].to_pylist() == [4, 5, 6, 7]


def test_interrupted_write_leaves_no_file(job: BatchJob, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, _ = plan(job, str(source), str(tmp_path / "output"))

    def interrupt(_table: pa.Table, path: str, **_: object) -> None:
        Path(path).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Embedder(job, str(source), str(tmp_path / "output")).process(parts[0])
    assert plan(job, str(source), str(tmp_path / "output"))[0] == parts
    assert embed(job, source, tmp_path / "output").num_rows == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "another job"),
        ({"columns": {"image": "picture"}}, "another job"),
        ({"columns": {"photo": "picture"}}, "no modality photo: there are image, text, vector, binary"),
        ({"columns": {"image": "photo"}}, "no column photo"),
        ({"columns": {}}, "no column is given"),
        ({"targets": ("photo",)}, "no modality photo"),
    ],
)
def test_plan_with_invalid_or_changed_options_raises(
    job: BatchJob, source: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    plan(job, str(source), str(tmp_path / "output"))
    with pytest.raises(JobError, match=message):
        plan(BatchJob(**{**vars(job), **change}), str(source), str(tmp_path / "output"))


def test_source_with_new_files_is_continued_and_with_changed_ones_raises(job: BatchJob, source: Path, tmp_path: Path) -> None:
    embed(job, source, tmp_path / "output")
    pq.write_table(rows(3), source / "b.parquet")
    assert [part.file for part in plan(job, str(source), str(tmp_path / "output"))[0]] == ["b-00000.parquet"]
    pq.write_table(rows(9), source / "a.parquet")
    with pytest.raises(JobError, match=r"a\.parquet: changed"):
        plan(job, str(source), str(tmp_path / "output"))


def test_plan_of_an_empty_folder_or_a_taken_column_raises(job: BatchJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no Parquet files"):
        plan(job, str(tmp_path), str(tmp_path / "output"))
    pq.write_table(rows(1).append_column("error", pa.array(["x"])), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="column error already"):
        plan(job, str(tmp_path / "a.parquet"), str(tmp_path / "output"))


def test_columns_hold_classes_as_strings_and_two_channel_images_as_numbers() -> None:
    brand = CategoricalModality(name="brand", classes=("acme", "zenith"))
    assert _column(brand, [np.array([0.2, 0.8], np.float32), None]).to_pylist() == ["zenith", None]
    scan = ImageModality(name="scan", channels=2, height=2, width=2)
    numbers = np.linspace(0, 1, 8, dtype=np.float32)
    column = _column(scan, [None, numbers.reshape(scan.shape)])
    assert column.type == pa.list_(pa.float32(), 8)
    assert column.to_pylist() == [None, numbers.tolist()]


def test_files_with_any_suffix_of_parquet_are_embedded(job: BatchJob, tmp_path: Path) -> None:
    source = tmp_path / "写真 [1] #2"
    source.mkdir()
    for name in ("a.parquet", "a.pq", "A.PARQUET"):
        pq.write_table(rows(2), source / name)
    (source / "notes.txt").write_text("no table")
    assert [part.file for part in plan(job, str(source), str(tmp_path / "output"))[0]] == [
        "A.PARQUET-00000.parquet",
        "a-00000.parquet",
        "a.pq-00000.parquet",
    ]
    assert embed(job, source, tmp_path / "output").num_rows == 6


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (["vector=a,b"], {"vector": ("a,b",)}),
        (["vector=a", "vector=b,c", "text=x=y"], {"vector": ("a", "b", "c"), "text": ("x=y",)}),
        (["vector=a,b,c"], {"vector": ("a", "b", "c")}),
    ],
)
def test_columns_of_options_are_names_of_the_file_first(given: list[str], columns: dict[str, tuple[str, ...]]) -> None:
    """A name with a comma in it is that column if there is one."""
    job = BatchJob(Path("bundle"), columns_from_options(given))
    assert resolve_columns(job, ["a", "b", "c", "a,b", "x=y"]) == columns


def test_several_columns_and_class_names_of_options_are_embedded_like_one_column(tiny_bundle: Bundle, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(4, 5)).round(3)
    letters = ("a", "bb", "c")
    table = {f"n{index}": numbers[:, index] for index in range(5)}
    pq.write_table(pa.table({**table, "number": range(4), "kind": [2.0, 0.0, None, 1.0]}), tmp_path / "a.parquet")
    texts = pa.array(["c", "a", None, "bb"])
    pq.write_table(pa.table({"number": range(4), "v": list(numbers), "kind": texts}), tmp_path / "b.parquet")
    options = class_names_from_options([f"text={','.join(letters)}"])
    given = columns_from_options(["text=kind", "vector=n0,n1,n2,n3,n4"])
    one = BatchJob(tiny_bundle.path, given, class_names=options)
    other = BatchJob(tiny_bundle.path, {"text": "kind", "vector": "v"})
    first = embed(one, tmp_path / "a.parquet", tmp_path / "one")
    second = embed(other, tmp_path / "b.parquet", tmp_path / "other")
    assert first["error"].null_count == second["error"].null_count == 4
    assert first["embedding"].to_pylist() == second["embedding"].to_pylist()
    with pytest.raises(JobError, match="another job"):
        plan(BatchJob(tiny_bundle.path, given), str(tmp_path / "a.parquet"), str(tmp_path / "one"))


@pytest.mark.parametrize("statistics", [True, False])
def test_pictures_by_path_and_as_lists_equal_files(tiny_bundle: Bundle, tmp_path: Path, statistics: bool) -> None:
    for number, folder in enumerate(("elsewhere", "next to it")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{number}.png").write_bytes(noise_image(number, (8, 8), "L"))
    levels = [np.asarray(Image.open(io.BytesIO(noise_image(number, (8, 8), "L")))).tolist() for number in range(2)]
    table = {
        "number": [0, 1],
        "file": [noise_image(number, (8, 8), "L") for number in range(2)],
        "path": ["0.png", "1.png"],
        "lists": levels,
    }
    pq.write_table(pa.table(table), tmp_path / "next to it" / "a.parquet", write_statistics=statistics)
    found = [
        embed(BatchJob(tiny_bundle.path, {"image": column}, data=data), tmp_path / "next to it", tmp_path / column)
        for column, data in (("file", None), ("path", str(tmp_path / "elsewhere")), ("lists", None))
    ]
    assert [table["error"].null_count for table in found] == [2, 2, 2]
    assert found[0]["embedding"].to_pylist() == found[1]["embedding"].to_pylist() == found[2]["embedding"].to_pylist()
    (tmp_path / "elsewhere" / "0.png").unlink()
    job = BatchJob(tiny_bundle.path, {"image": "path"}, data=str(tmp_path / "elsewhere"))
    (error, _) = embed(job, tmp_path / "next to it", tmp_path / "again")["error"].to_pylist()
    assert error == f"bad_image: image: no such file: '0.png' in {tmp_path / 'elsewhere'} or {tmp_path / 'next to it'}"


def test_run_without_any_embedding_has_a_reason() -> None:
    good, bad = Done(3, 1, "bad_text: a"), Done(2, 2, "bad_class: b")
    assert summary([good, bad], 5) == "5 rows in 2 files, 3 without embedding; 3 files were there already"
    assert reason_of_failure([]) == reason_of_failure([Done(0, 0)]) == reason_of_failure([good, bad]) == ""
    assert "no row has an embedding. The first: bad_class: b" in reason_of_failure([Done(0, 0), bad])
    empty = Done(1, 1, "wrong_type: every modality is absent")
    assert "The first: bad_class: b" in reason_of_failure([empty, bad])
    assert "The first: wrong_type: every modality is absent" in reason_of_failure([empty])


def test_reason_of_a_part_is_that_of_a_row_with_a_modality(job: BatchJob, tmp_path: Path) -> None:
    pq.write_table(rows(7).slice(5).take([1, 0]), tmp_path / "a.parquet")  # the empty row first
    (part,), _ = plan(job, str(tmp_path / "a.parquet"), str(tmp_path / "output"))
    done = Embedder(job, str(tmp_path / "a.parquet"), str(tmp_path / "output")).process(part)
    assert (done.rows, done.failed) == (2, 2)
    assert done.reason.startswith("bad_image: image: not a PNG")
