"""Figures measured over HTTP agree with those of the bundle, and wrong figures of a bundle are detected."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.support.bundles import write_copy
from tests.tools.served import app


def measure(finished: Any, bundle: Path) -> tuple[int, dict[str, Any]]:
    """Run the tool and return its exit code and figures."""
    options = ["--bundle", str(bundle), "--classifiers", str(finished.folder), "--rows", "60"]
    result = CliRunner().invoke(app, [str(finished.config), *options])
    return result.exit_code, json.loads(result.stdout)


def test_served_detects_figures_that_differ_from_the_bundle(finished: Any, tmp_path: Path) -> None:
    _, figures = measure(finished, finished.bundle)
    assert len(figures["coherence"]) == 9
    assert all(figure["agrees"] for figure in figures["coherence"].values())
    # An undertrained model also separates texts by their offset, which requests do not have.
    assert {name for name, figure in figures["probe"].items() if not figure["agrees"] and "word" not in name} == set()
    metrics = json.loads((finished.bundle / "manifest.json").read_text())["metrics"]
    metrics["probe"] |= {name: figure["served"] for name, figure in figures["probe"].items()}
    status, _ = measure(finished, write_copy(tmp_path / "correct", finished.bundle, metrics=metrics).path)
    assert status == 0
    metrics["probe"]["photo"] += 0.1
    status, figures = measure(finished, write_copy(tmp_path / "wrong", finished.bundle, metrics=metrics).path)
    assert status == 1
    assert not figures["probe"]["photo"]["agrees"]
