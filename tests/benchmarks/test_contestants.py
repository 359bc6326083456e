"""How each is spoken to, and what a rival serves: our graph, our codec, our numbers."""

import json

import numpy as np
import pytest

from model import bundle
from model.modality import collate
from model.runtime import Runtime
from tests.benchmarks.contestants import ALL, NOOP, Contestant
from tests.benchmarks.peers.digits import Digits
from tests.benchmarks.samples import pictures, words


@pytest.mark.parametrize("one", [one for one in ALL if one is not NOOP], ids=lambda one: one.name)
def test_a_request_holds_the_item_and_an_answer_its_vector(one: Contestant) -> None:
    item = {**pictures()[0], **words()[7]}
    (request,) = one.requests([item])
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(f"POST {one.path} HTTP/1.1".encode())
    assert f"content-length: {len(body)}".encode() in head
    assert all(value in body.decode() for value in item.values())
    answers = {
        "concord": {"data": [{"embedding": [1.0, 2.0]}]},
        "fastapi": {"embeddings": [[1.0, 2.0]]},
        "litserve": {"embedding": [1.0, 2.0]},
        "bentoml": [[1.0, 2.0]],
        "mlserver": {"outputs": [{"name": "embedding", "shape": [1, 2], "data": [1.0, 2.0]}]},
    }
    np.testing.assert_array_equal(one.read(json.dumps(answers[one.name]).encode()), [[1.0, 2.0]])


def test_what_rivals_serve_is_the_bundle() -> None:
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    digits = Digits()
    rows = [digits.decode(item) for item in (*pictures()[:3], *words()[:2], {**pictures()[3], **words()[3]})]
    expected = runtime.encode(*collate(runtime.modalities, rows)).mean
    np.testing.assert_allclose(digits.encode(rows), expected, atol=1e-5)
