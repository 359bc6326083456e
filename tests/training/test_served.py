"""Figures measured over HTTP agree with what the bundle carries, and a bundle that boasts is found out."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.copies import write_copy
from tests.served import app


def served(finished: Any, bundle: Path) -> tuple[int, dict[str, Any]]:
    options = ["--bundle", str(bundle), "--judged", str(finished.folder), "--rows", "60"]
    result = CliRunner().invoke(app, [str(finished.config), *options])
    return result.exit_code, json.loads(result.stdout)


def test_served_figures_are_those_carried(finished: Any, tmp_path: Path) -> None:
    _, figures = served(finished, finished.bundle)
    assert len(figures["coherence"]) == 9
    assert all(one["agrees"] for one in figures["coherence"].values())
    # A weak model tells texts apart by their offset too, which nobody sends.
    assert {name for name, one in figures["probe"].items() if not one["agrees"] and "word" not in name} == set()
    metrics = json.loads((finished.bundle / "manifest.json").read_text())["metrics"]
    metrics["probe"] |= {name: one["served"] for name, one in figures["probe"].items()}
    status, _ = served(finished, write_copy(tmp_path / "honest", finished.bundle, metrics=metrics).path)
    assert status == 0
    metrics["probe"]["photo"] += 0.1
    status, figures = served(finished, write_copy(tmp_path / "boasting", finished.bundle, metrics=metrics).path)
    assert status == 1
    assert not figures["probe"]["photo"]["agrees"]
