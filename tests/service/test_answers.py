import base64
from typing import Any

import numpy as np
import orjson
import pytest

from model.runtime import Runtime
from service import answers
from service.calls import Item, Rejected
from service.engine import Outcome, Refinement
from service.errors import Problem
from service.schemas import EmbedOptions


def embed(runtime: Runtime, vector: np.ndarray, rejected: list[Rejected] | None = None, **options: Any) -> dict[str, Any]:
    refinement = Refinement(2, "observed", -3.0, -1.0, "steps", [-3.0, -2.0, -1.0])
    outcome = Outcome(vector, np.zeros_like(vector), None, {}, refinement, {})
    item = Item(1, "b", {"word": np.zeros(8, dtype=np.int64)}, 0, 3)
    content = answers.embed(
        runtime.bundle.manifest, EmbedOptions.model_validate(options), [(item, outcome)], rejected or [], "abc"
    )
    return dict(orjson.loads(content))


def test_the_zero_vector_has_no_direction_and_stays(runtime: Runtime) -> None:
    answer = embed(runtime, np.zeros(runtime.latent, dtype=np.float32), normalize=True)
    assert answer["data"][0]["embedding"] == [0.0] * runtime.latent


@pytest.mark.parametrize("magnitude", [1e-18, 1.0, 1e18])
def test_unit_norm_at_any_magnitude(runtime: Runtime, magnitude: float) -> None:
    vector = np.float32(magnitude) * np.random.default_rng(0).standard_normal(runtime.latent, dtype=np.float32)
    packed = embed(runtime, vector, normalize=True, encoding_format="base64")["data"][0]["embedding"]
    unit = np.frombuffer(base64.b64decode(packed), dtype="<f4")
    assert np.linalg.norm(unit.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_the_trace_is_told_when_asked_for(runtime: Runtime) -> None:
    vector = np.ones(runtime.latent, dtype=np.float32)
    assert embed(runtime, vector, refine={"trace": True})["data"][0]["refinement"]["trace"] == [-3.0, -2.0, -1.0]
    assert "trace" not in embed(runtime, vector)["data"][0]["refinement"]


def test_failed_items_stand_in_their_place(runtime: Runtime) -> None:
    failed = [Rejected(2, None, Problem("bad_text", "no")), Rejected(0, "a", Problem("bad_image", "no"))]
    data = embed(runtime, np.ones(runtime.latent, dtype=np.float32), failed)["data"]
    assert [(d["index"], d["id"], d.get("error", {}).get("status")) for d in data] == [
        (0, "a", 400),
        (1, "b", None),
        (2, None, 422),
    ]
    assert data[0]["error"]["instance"] == "urn:request:abc"
