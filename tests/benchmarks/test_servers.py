"""Requests and responses of each server, and the model that the competitors serve."""

import json

import numpy as np
import pytest

from concord.model import bundle
from concord.model.modality import collate
from concord.model.runtime import Runtime
from tests.benchmarks.competitors.digits import DigitsEncoder
from tests.benchmarks.items import photo_items, word_items
from tests.benchmarks.servers import NOOP, SERVERS, Server


@pytest.mark.parametrize("server", [server for server in SERVERS if server is not NOOP], ids=lambda server: server.name)
def test_server_request_holds_the_item_and_response_parses_to_its_embedding(server: Server) -> None:
    item = {**photo_items()[0], **word_items()[7]}
    (request,) = server.requests([item])
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(f"POST {server.path} HTTP/1.1".encode())
    assert f"content-length: {len(body)}".encode() in head
    assert all(value in body.decode() for value in item.values())
    responses = {
        "concord": {"data": [{"embedding": [1.0, 2.0]}]},
        "fastapi": {"embeddings": [[1.0, 2.0]]},
        "litserve": {"embedding": [1.0, 2.0]},
        "bentoml": [[1.0, 2.0]],
        "mlserver": {"outputs": [{"name": "embedding", "shape": [1, 2], "data": [1.0, 2.0]}]},
    }
    np.testing.assert_array_equal(server.parse_embeddings(json.dumps(responses[server.name]).encode()), [[1.0, 2.0]])


def test_digits_encoder_of_the_competitors_equals_the_bundles_runtime() -> None:
    runtime = Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)
    encoder = DigitsEncoder()
    items = (*photo_items()[:3], *word_items()[:2], {**photo_items()[3], **word_items()[3]})
    rows = [encoder.parse(item) for item in items]
    expected = runtime.encode(*collate(runtime.modalities, rows)).mean
    np.testing.assert_allclose(encoder.encode(rows), expected, atol=1e-5)
