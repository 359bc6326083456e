"""Prose and names use the field's terms: the packages and the documents hold none of the words that they replace."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT

SUFFIXES = {".py", ".md", ".js", ".html", ".css", ".toml", ".yaml", ".yml", ".sh"}
FOLDERS = [ROOT / folder for folder in ("model", "service", "training", "docker")]
FILES = [
    *(file for folder in FOLDERS for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES or file.name == "Dockerfile"),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml", "tests/README.md")),
]

INSTEAD = {
    r"doors?|turned away|turns away|refusals?|objections?": "admission control, rejection",
    r"exercises?|trials?": "warm up, self-test",
    r"answers?|answered|answering|reply|replies|replied": "response (HTTP), result (engine)",
    r"told|tells?|asked|asks|nobody|whoever|whatever|whom": "what happens, without a person in it",
    r"landmarks?": "reference embeddings",
    r"ascents?|climbs?|climbed|climbing": "refinement state, refine",
    r"evidences?": "reconstruction, expected log-likelihood",
    r"judges?|judged|judging": "frozen classifier, evaluation noise",
    r"rivals?|peers?|contestants?": "baseline (a model), competitor (a server)",
    r"neighbou?rs?|rooms?": "local world size; memory; folder",
    r"beside|besides|parted|apart|no more than|by heart|of its own|of their own": "next to, while, split, at most, separate",
    r"wires?": "codec",
}
"""Pattern of words, and what to write."""
CHANGELOG_QUOTES = re.compile(r"\(was [^)]*\)")
ALLOWED = {
    "training/reports/summary.py": {"judges"},  # the key in files of earlier versions
    "training/tune.py": {"tell", "trial", "trials"},  # functions of Optuna
}


def _words(file: Path, pattern: str) -> Iterator[str]:
    text = CHANGELOG_QUOTES.sub("", file.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), start=1):
        for match in re.finditer(rf"(?<![a-z])({pattern})(?![a-z])", line, re.IGNORECASE):
            if match[0].lower() not in ALLOWED.get(file.relative_to(ROOT).as_posix(), set()):
                yield f"{file.relative_to(ROOT)}:{number}: {match[0]}"


@pytest.mark.parametrize("pattern", INSTEAD, ids=lambda pattern: pattern.split("|")[0].rstrip("?"))
def test_packages_and_documents_use_standard_terms(pattern: str) -> None:
    found = [place for file in FILES for place in _words(file, pattern)]
    assert not found, f"write instead: {INSTEAD[pattern]}\n" + "\n".join(found)


def test_words_finds_a_forbidden_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.architecture.test_words.ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text("def asked_of(door):\n    ...\nindoors = outdoorsy = 1\n")
    assert [list(_words(file, pattern)) for pattern in INSTEAD] == [
        ["module.py:1: door"],
        [],
        [],
        ["module.py:1: asked"],
        *[[]] * 8,
    ]
