"""GET /v1/models: what is served, where it came from and what it takes."""

from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from model.codec import MEDIA_TYPES
from model.modality import ImageModality, Modality
from service.bundles import Bundles
from service.schemas import ModelAnswer, ModelsAnswer
from service.serving import Serving

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelsAnswer, summary="The bundles that are served")
async def models(request: Request) -> Response:
    """In the shape of OpenAI's list of models, with more fields."""
    bundles: Bundles = request.app.state.bundles
    return _answer({"object": "list", "data": [describe(bundles, serving) for serving in bundles.all()]})


@router.get("/{model}", response_model=ModelAnswer, summary="One bundle")
async def model(request: Request, model: str) -> Response:
    """``model`` is a name, or name@version."""
    bundles: Bundles = request.app.state.bundles
    return _answer(describe(bundles, bundles.choose(model)))


def describe(bundles: Bundles, serving: Serving) -> dict[str, Any]:
    """The answer for one bundle."""
    manifest, settings = serving.manifest, serving.settings
    created = datetime.fromisoformat(manifest.provenance.created)
    return {
        "id": manifest.name,
        "object": "model",
        "created": int(created.replace(tzinfo=created.tzinfo or UTC).timestamp()),
        "owned_by": "concord",
        "version": manifest.version,
        "state": bundles.state(serving),
        "latent": manifest.latent,
        "modalities": [_modality(m) for m in manifest.modalities],
        "capabilities": ["embed", "cross-generate", "refine"],
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_items": settings.max_items,
            "max_pixels": settings.max_pixels,
            "max_samples": settings.max_samples,
            "max_refine_steps": settings.max_refine_steps,
            "request_timeout_ms": settings.request_timeout_ms,
        },
        "provenance": {
            "sha256": serving.runtime.bundle.sha256,
            **manifest.provenance.model_dump(mode="json"),
            "metrics": manifest.metrics,
        },
    }


def _modality(modality: Modality) -> dict[str, Any]:
    facts = {**modality.model_dump(mode="json", exclude_none=True), "shape": list(modality.shape)}
    return {**facts, "media_types": list(MEDIA_TYPES)} if isinstance(modality, ImageModality) and modality.in_files else facts


def _answer(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
