"""``concord report``: the generated sections of the committed documents are current."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from concord.training.cli import app
from tests.support.server import ROOT


@pytest.mark.slow
def test_report_leaves_committed_documents_and_charts_unchanged(tmp_path: Path) -> None:
    results = tmp_path / "training" / "results"
    shutil.copytree(ROOT / "training" / "results", results)
    files = [Path("README.md"), Path("training/README.md")]
    for file in files:
        shutil.copy(ROOT / file, tmp_path / file)
    files += [path.relative_to(tmp_path) for path in results.rglob("*") if path.is_file()]
    done = CliRunner().invoke(app, ["report", "--root", str(tmp_path), "--results", str(results)])
    assert done.exit_code == 0, done.output
    changed = [file for file in files if (tmp_path / file).read_bytes() != (ROOT / file).read_bytes()]
    assert not changed, "run: make report"
