"""The JSON of embeddings."""

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from concord.model.runtime import Runtime
from concord.service.api import responses
from concord.service.api.requests import ParsedItem, RejectedItem
from concord.service.api.schemas import EmbedOptions
from concord.service.errors import Problem
from concord.service.inference.jobs import InferenceResult, RefinementResult


def embed(runtime: Runtime, vector: np.ndarray, rejected: list[RejectedItem] | None = None, **options: Any) -> dict[str, Any]:
    """Return the body for one item, at index 1, with this embedding."""
    refinement = RefinementResult(2, "observed", -3.0, -1.0, "steps", [-3.0, -2.0, -1.0])
    result = InferenceResult(vector, np.zeros_like(vector), None, {}, refinement, {})
    item = ParsedItem(1, "b", {"word": np.zeros(8, dtype=np.int64)}, 0, 3)
    content = responses.embed(
        runtime.bundle.manifest, EmbedOptions.model_validate(options), [(item, result)], rejected or [], "abc"
    )
    return dict(orjson.loads(content))


def test_normalize_leaves_the_zero_vector(runtime: Runtime) -> None:
    body = embed(runtime, np.zeros(runtime.latent, dtype=np.float32), normalize=True)
    assert body["data"][0]["embedding"] == [0.0] * runtime.latent


@pytest.mark.parametrize("magnitude", [1e-18, 1.0, 1e18])
def test_normalize_at_any_magnitude_returns_a_unit_vector(runtime: Runtime, magnitude: float) -> None:
    vector = np.float32(magnitude) * np.random.default_rng(0).standard_normal(runtime.latent, dtype=np.float32)
    packed = embed(runtime, vector, normalize=True, encoding_format="base64")["data"][0]["embedding"]
    unit = np.frombuffer(base64.b64decode(packed), dtype="<f4")
    assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_trace_is_returned_only_on_request(runtime: Runtime) -> None:
    vector = np.ones(runtime.latent, dtype=np.float32)
    assert embed(runtime, vector, refine={"trace": True})["data"][0]["refinement"]["trace"] == [-3.0, -2.0, -1.0]
    assert "trace" not in embed(runtime, vector)["data"][0]["refinement"]


def test_rejected_items_keep_their_position(runtime: Runtime) -> None:
    rejected = [RejectedItem(2, None, Problem("bad_text", "no")), RejectedItem(0, "a", Problem("bad_image", "no"))]
    data = embed(runtime, np.ones(runtime.latent, dtype=np.float32), rejected)["data"]
    assert [(d["index"], d["id"], d.get("error", {}).get("status")) for d in data] == [
        (0, "a", 400),
        (1, "b", None),
        (2, None, 422),
    ]
    assert data[0]["error"]["instance"] == "urn:request:abc"
