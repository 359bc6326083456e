"""The README's Python runs, as it stands, against a service of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.readme import ADDRESS, README
from tests.server import ROOT, running

BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
SAID = ["(2, 32)\n", "2\n"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as service:
        yield service.address


@pytest.mark.parametrize(("block", "said"), list(zip(BLOCKS, SAID, strict=True)))
def test_it_runs_and_says_what_it_says(block: str, said: str, address: str, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    script = block.replace(ADDRESS, address)
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (said, "")
    if "seven.png" in script:
        with Image.open(tmp_path / "seven.png") as image:
            assert image.size == (28, 28)
