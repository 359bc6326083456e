"""The Python blocks of the documents run as they stand, against a real service."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.documents import ADDRESS, README, SERVICE_README, python_blocks
from tests.support.server import ROOT, running

BLOCKS = [*python_blocks(README), *python_blocks(SERVICE_README)]
OUTPUTS = ["(2, 32)\n", "2\n"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as service:
        yield service.address


@pytest.mark.parametrize(("block", "output"), list(zip(BLOCKS, OUTPUTS, strict=True)))
def test_python_block_runs_and_prints_what_it_states(block: str, output: str, address: str, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    script = block.replace(ADDRESS, address)
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (output, "")
    if "seven.png" in script:
        with Image.open(tmp_path / "seven.png") as image:
            assert image.size == (28, 28)
