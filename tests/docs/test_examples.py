"""The examples of the documents: their responses are the service's."""

import base64
import contextlib
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from concord.model.bundle import DEFAULT_BUNDLE, SOUND_BUNDLE
from tests.support.documents import README, SERVICE_README, Example, examples
from tests.support.server import running

EXAMPLES = [*examples(README), *examples(SERVICE_README)]


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as services:
        names = {example.bundle for example in EXAMPLES}
        yield {name: services.enter_context(running("--bundle", name)).address for name in names}


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{i}" for i in range(len(EXAMPLES))])
def test_example_response_equals_the_service(example: Example, addresses: dict[str, str]) -> None:
    _assert_equal(json.loads(example.run(addresses[example.bundle])), json.loads(example.response), "")


def test_examples_cover_every_kind_of_request() -> None:
    assert [example.bundle for example in examples(README)] == [DEFAULT_BUNDLE, SOUND_BUNDLE]
    commands = " ".join(example.command for example in EXAMPLES)
    for route in ("/embed", "/cross-generate", "refine.steps"):
        assert route in commands


def _assert_equal(received: object, stated: object, place: str) -> None:
    """Equal up to rounding and the request id."""
    assert type(received) is type(stated), place
    if isinstance(stated, dict) and isinstance(received, dict):
        assert received.keys() == stated.keys(), place
        for key, value in stated.items():
            _assert_equal(received[key], value, f"{place}/{key}")
    elif isinstance(stated, list) and isinstance(received, list):
        assert len(received) == len(stated), place
        for index, value in enumerate(stated):
            _assert_equal(received[index], value, f"{place}/{index}")
    elif isinstance(stated, float):
        assert received == pytest.approx(stated, rel=1e-3, abs=1e-3), place
    elif isinstance(stated, str) and isinstance(received, str) and stated.startswith("iVBOR"):
        difference = np.abs(_pixels(received).astype(int) - _pixels(stated))
        assert difference.max() <= 2, place
    elif not place.endswith("/instance"):
        assert received == stated, place


def _pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
