from collections.abc import Callable
from pathlib import Path

import pytest

from concord.model import bundle
from tests.support.bundles import write_copy

WriteBundle = Callable[..., Path]


@pytest.fixture
def write_bundle(tmp_path: Path, tiny_bundle: bundle.Bundle) -> WriteBundle:
    """``write_bundle("served", version="2")``: a folder of this name with the tiny bundle, with some fields changed."""
    return lambda folder, **facts: write_copy(tmp_path / folder, tiny_bundle.path, **facts).path


@pytest.fixture
def served_folder(write_bundle: WriteBundle) -> Path:
    """The folder of tiny, version 1.0."""
    return write_bundle("served", version="1.0")
