"""Links, generated sections and commands of the documents."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from concord.service import cli as service_cli
from concord.service.api.schemas import EmbeddingsOptions, EmbedOptions, GenerateOptions
from concord.training import cli as training_cli
from tests.support.documents import README, SECTIONS, SERVICE_README, documents, section
from tests.support.server import ROOT

DOCUMENTS = documents()
ROUTES: dict[str, list[type[BaseModel]]] = {
    "all": [EmbedOptions, GenerateOptions, EmbeddingsOptions],
    "all but OpenAI's": [EmbedOptions, GenerateOptions],
    "`/embed`": [EmbedOptions],
    "`/cross-generate`": [GenerateOptions],
    "`/v1/embeddings`": [EmbeddingsOptions],
}
"""Models of the options that a cell of the options table stands for."""
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_lead_to_files(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = document.parent / path
        assert target.exists(), f"{name(document)} links to {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(document)} links to {path}{anchor}"


def anchors(document: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_links_every_page_of_a_reader() -> None:
    text = README.read_text(encoding="utf-8")
    pages = ("service", "training", "training/results", "tests/benchmarks", "docker", "model", "tests")
    for page in pages:
        assert f"({page}/README.md)" in text, page


@pytest.mark.parametrize(("document", "marker"), SECTIONS, ids=lambda part: name(part) if isinstance(part, Path) else part)
def test_generated_section_is_current(document: Path, marker: str) -> None:
    assert section(document.read_text(encoding="utf-8"), marker) == SECTIONS[document, marker](), "run: make report"


def options(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """The defaults of all options by name, as JSON without quotation marks; None for null."""
    found: dict[str, str | None] = {}
    for key, field in model.model_fields.items():
        if isinstance(nested := field.get_default(call_default_factory=True), BaseModel):
            found |= options(type(nested), f"{prefix}{key}.")
        elif len(get_args(field.annotation)) != 1:  # a literal of one value is no option
            found[prefix + key] = None if nested is None else json.dumps(nested).strip('"')
    return found


def test_options_table_has_every_option_with_its_default() -> None:
    text = SERVICE_README.read_text(encoding="utf-8").partition("| option |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    stated = {option: default.strip("`") if default.startswith("`") else None for option, _, default in rows}
    assert stated == options(EmbedOptions) | options(GenerateOptions) | options(EmbeddingsOptions)
    for option, routes, _ in rows:
        models = [model for model in (EmbedOptions, GenerateOptions, EmbeddingsOptions) if option in options(model)]
        assert ROUTES[routes] == models, option


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_concord_commands_exist(document: Path) -> None:
    commands = {
        command.name or command.callback.__name__  # type: ignore[union-attr]
        for app in (service_cli.app, training_cli.app)
        for command in app.registered_commands
    }
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for word in re.findall(r"(?:^|&& |; |=\S+ )concord ([a-z-]+)", block, re.MULTILINE):
            assert word in commands, f"concord {word}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)", document.read_text(encoding="utf-8")):
            assert target in targets, f"{name(document)}: make {target}"
