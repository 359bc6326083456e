"""Parquet files in object stores: a local S3 server, and the file systems of fsspec."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import S3FileSystem

from concord.model.modality import CategoricalModality, VectorModality
from concord.training.config import Source
from concord.training.data.sources import open_table, read_table
from concord.training.errors import DataError

ROWS = pa.table({"brand": ["a", "b", "a", None, "b", "a"], "size": [1.0, 2.0, 3.0, 4.0, 5.0, None]})
MODALITIES = {
    "brand": CategoricalModality(name="brand", classes=("a", "b")),
    "size": VectorModality(name="size", size=1, mean=(3.0,), std=(1.0,)),
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The query of an address that leads to the server."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    files = S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", access_key="key", secret_key="secret", allow_bucket_creation=True
    )
    files.create_dir("shop")
    with files.open_output_stream("shop/rows.parquet") as stream:
        pq.write_table(ROWS, stream, row_group_size=2)
    yield f"scheme=http&endpoint_override={host}%3A{port}&region=us-east-1"
    server.stop()


def source(address: str) -> Source:
    return Source(train=address, held_out=0.34, columns={"brand": "brand", "size": "size"}, licence="none")


def test_s3_rows_are_those_of_the_file(s3: str, tmp_path: Path) -> None:
    address = f"s3://key:secret@shop/rows.parquet?{s3}"
    pq.write_table(ROWS, tmp_path / "rows.parquet", row_group_size=2)
    for split in ("train", "test"):
        remote = read_table(source(address), split, MODALITIES, tmp_path)
        local = read_table(source("rows.parquet"), split, MODALITIES, tmp_path)
        for name, column in remote.columns.items():
            assert (column.values == local.columns[name].values).all()
            assert (column.present == local.columns[name].present).all()
        assert remote.source.sha256 == local.source.sha256
        assert remote.source.file == "s3://shop/rows.parquet"  # without the credentials: it is in the bundle


def test_s3_absent_file_is_reported_with_its_address(s3: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://shop/none\.parquet: cannot be opened"):
        open_table(f"s3://key:secret@shop/none.parquet?{s3}", tmp_path)


def test_file_systems_of_fsspec_are_read_and_changes_are_noticed(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/rows.parquet", "wb") as stream:
        pq.write_table(ROWS, stream)
    table = open_table("memory://rows.parquet", tmp_path)
    assert pa.Table.from_batches(table.batches(["brand", "size"])).to_pydict() == ROWS.to_pydict()
    assert table.sha256() is not None
    with memory.open("/rows.parquet", "wb") as stream:
        pq.write_table(ROWS.slice(0, 3), stream)
    with pytest.raises(DataError, match="was changed while it was read"):
        table.sha256()


def test_unknown_scheme_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file system for nowhere://"):
        open_table("nowhere://rows.parquet", tmp_path)
