"""The commands of training/README.md run as they stand, from a Parquet file to responses of a service."""

import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

from concord.client import Client
from concord.service import cli
from concord.training.cli import app
from tests.support.bulk import run_serially
from tests.support.documents import python_blocks
from tests.support.server import ROOT, running
from tests.support.shop import write_shop

pytestmark = pytest.mark.slow

PAGE = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
_BLOCK = PAGE.partition("```sh\n")[2].partition("```")[0]
_INSTALL, *COMMANDS = [line.partition("#")[0].strip() for line in _BLOCK.splitlines()]
REQUESTS = re.findall(r"^\$ (curl .*)$", PAGE.partition("## Kinds of modality")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands ran except the last, which serves. Training is shortened: the page promises no length."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "shop.parquet")
    with contextlib.chdir(folder):
        for command in COMMANDS[:-1]:
            program, *words = shlex.split(command)
            assert program == "concord"
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
            if words[0] == "init":
                config = folder / "shop.toml"
                shorter = re.sub(r"epochs = \d+", "epochs = 2", config.read_text())
                config.write_text(re.sub(r"# threads = \d+", "threads = 1", shorter))  # two threads wait for each other in CI
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    *command, path = shlex.split(COMMANDS[-1])
    assert command == ["concord", "serve", "--bundle"]
    with running(CONCORD_BUNDLE=str(folder / path)) as service:
        yield service.address


@pytest.fixture(scope="module")
def responses(address: str) -> list[dict[str, Any]]:
    return [json.loads(subprocess.check_output(shlex.split(line.replace("localhost:8000", address)))) for line in REQUESTS]


def test_example_file_lacks_the_stated_share_of_values(folder: Path) -> None:
    table = datasets.Dataset.from_parquet(str(folder / "shop.parquet"))
    assert table.column_names == ["photo", "title", "brand", "measures"]
    for column in table.column_names:
        assert 0.3 < sum(value is None for value in table[column]) / len(table) < 0.5


def test_responses_hold_embeddings_and_missing_modalities(responses: list[dict[str, Any]]) -> None:
    embedded, generated = responses
    (item,) = embedded["data"]
    assert item["modalities"] == ["title", "measures"]
    assert len(item["embedding"]) == embedded["dimensions"] == 32
    (values,) = [item["generated"] for item in generated["data"]]
    assert set(values) == {"brand", "measures"}
    assert values["brand"][0]["class"] in ("acme", "none", "zenith")
    assert len(values["measures"][0]["data"]) == 3


def test_evaluation_without_labels_has_retrieval_and_no_probe(folder: Path) -> None:
    metrics = json.loads((folder / "runs" / "shop" / "evaluation.json").read_text())
    assert "probe" not in metrics
    assert set(metrics["retrieval"]) == {"photo", "title", "brand", "measures", "others"}
    card = (folder / "runs" / "shop" / "bundle" / "README.md").read_text()
    assert "| title | photo |" in card


def test_search_finds_rows_by_word_by_photo_and_by_both(
    folder: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install faiss-cpu")
    run_serially(monkeypatch)
    monkeypatch.chdir(folder)
    (command,) = re.findall(r"^concord (embed-dataset .*)$", PAGE, re.MULTILINE)
    done = CliRunner().invoke(cli.app, shlex.split(command))
    assert done.exit_code == 0, done.output
    (block,) = python_blocks(ROOT / "training" / "README.md")
    names: dict[str, Any] = {}
    exec(block.replace("localhost:8000", address), names)  # what a reader would paste
    shop, found = names["shop"], names["found"]
    titles = eval(capsys.readouterr().out)
    assert titles == shop.take(found[0])["title"].to_pylist()
    assert found.shape == (3, 5)
    norms = np.linalg.norm(names["vectors"], axis=1)
    cosines = names["queries"] @ (names["vectors"] / norms[:, None]).T
    best = np.sort(cosines, axis=1)[:, -5:]
    np.testing.assert_allclose(np.sort(np.take_along_axis(cosines, found, axis=1), axis=1), best, rtol=1e-5)  # rows may tie
    own = {"photo": shop["photo"][0].as_py(), "title": shop["title"][0].as_py(), "brand": shop["brand"][0].as_py()}
    with Client(f"http://{address}") as client:
        embedding = client.embed([own]).matrix
    np.testing.assert_allclose(embedding[0], names["vectors"][0], atol=1e-4, err_msg="the file holds what a request gets")
