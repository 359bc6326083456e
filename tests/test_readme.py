"""The README says what is so: its answers are the service's, its table is the bundle's."""

import base64
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from model import bundle
from tests.readme import README, Example, examples
from tests.server import running
from training.report import results_table

EXAMPLES = examples()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as service:
        yield service.address


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{i}" for i in range(len(EXAMPLES))])
def test_answer_is_the_services(example: Example, address: str) -> None:
    _assert_alike(json.loads(example.run(address)), json.loads(example.answer), "")


def test_there_is_an_example_for_each_call() -> None:
    commands = " ".join(example.command for example in EXAMPLES)
    assert "/embed" in commands
    assert "/cross-generate" in commands


def test_results_are_the_bundles() -> None:
    manifest = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE)).manifest
    assert results_table(manifest) in README.read_text(encoding="utf-8")


def _assert_alike(received: object, stated: object, place: str) -> None:
    """Equal, but for rounding and the request's own name."""
    assert type(received) is type(stated), place
    if isinstance(stated, dict) and isinstance(received, dict):
        assert received.keys() == stated.keys(), place
        for key, value in stated.items():
            _assert_alike(received[key], value, f"{place}/{key}")
    elif isinstance(stated, list) and isinstance(received, list):
        assert len(received) == len(stated), place
        for index, value in enumerate(stated):
            _assert_alike(received[index], value, f"{place}/{index}")
    elif isinstance(stated, float):
        assert received == pytest.approx(stated, rel=1e-3, abs=1e-3), place
    elif isinstance(stated, str) and isinstance(received, str) and stated.startswith("iVBOR"):
        difference = np.abs(_pixels(received).astype(int) - _pixels(stated))
        assert difference.max() <= 2, place
    elif not place.endswith("/instance"):
        assert received == stated, place


def _pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
