"""training/README.md says what is so: its commands are run, from a Parquet file to the answers of a service."""

import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from tests.server import ROOT, running
from tests.training.shop import write_shop
from training.__main__ import app

TUTORIAL = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in re.search(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL)[1].splitlines()]  # type: ignore[index]
ASKED = re.findall(r"^\$ (curl .*)$", TUTORIAL, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands were run, all but the last, which serves. Training is cut short: its length is no part of the page."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "shop.parquet")
    with contextlib.chdir(folder):
        for command in COMMANDS[:-1]:
            words = shlex.split(command)
            assert words[:3] == ["python", "-m", "training"]
            done = CliRunner().invoke(app, words[3:])
            assert done.exit_code == 0, done.output
            if words[3] == "init":
                drafted = folder / "shop.toml"
                shorter = re.sub(r"epochs = \d+", "epochs = 2", drafted.read_text())
                drafted.write_text(re.sub(r"threads = \d+", "threads = 1", shorter))  # two wait for each other on shared cores
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Iterator[list[dict[str, Any]]]:
    setting, *words = shlex.split(COMMANDS[-1])
    assert words[:3] == ["python", "-m", "service"]
    name, _, path = setting.partition("=")
    with running(**{name: str(folder / path)}) as service:
        yield [
            json.loads(subprocess.check_output(shlex.split(line.replace("localhost:8000", service.address)))) for line in ASKED
        ]


def test_the_file_is_as_the_page_says(folder: Path) -> None:
    table = datasets.Dataset.from_parquet(str(folder / "shop.parquet"))
    assert table.column_names == ["photo", "title", "brand", "measures"]
    for column in table.column_names:
        assert 0.3 < sum(value is None for value in table[column]) / len(table) < 0.5


def test_the_answers_are_embeddings_and_what_was_lacking(answers: list[dict[str, Any]]) -> None:
    embedded, made = answers
    (one,) = embedded["data"]
    assert one["modalities"] == ["title", "measures"]
    assert len(one["embedding"]) == embedded["dimensions"] == 32
    (generated,) = [one["generated"] for one in made["data"]]
    assert set(generated) == {"brand", "measures"}
    assert generated["brand"][0]["class"] in ("acme", "none", "zenith")
    assert len(generated["measures"][0]["data"]) == 3


def test_what_was_measured_needs_no_label(folder: Path) -> None:
    figures = json.loads((folder / "runs" / "shop" / "evaluation.json").read_text())
    assert "probe" not in figures
    assert set(figures["retrieval"]) == {"photo", "title", "brand", "measures"}
    card = (folder / "runs" / "shop" / "bundle" / "README.md").read_text()
    assert "| title | photo |" in card
