"""GET /v1/models: what is served, where it came from and what it accepts."""

from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response

from concord.model.bundle.manifest import GalleryFacts
from concord.model.codec import media_types
from concord.model.modality import Modality
from concord.service.api.requests import choose
from concord.service.api.schemas import ModelAnswer, ModelsAnswer
from concord.service.inference.reload import Reloader
from concord.service.inference.served_model import ServedModel
from concord.service.settings import Settings

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelsAnswer, summary="The bundles that are served")
async def models(request: Request) -> Response:
    """In the shape of OpenAI's list of models, with more fields."""
    app = request.app
    return _respond({"object": "list", "data": [describe(app, model) for model in app.state.registry.all()]})


@router.get("/{model}", response_model=ModelAnswer, summary="One bundle")
async def model(request: Request, model: str) -> Response:
    """``model`` is a name, or name@version."""
    return _respond(describe(request.app, choose(request.app.state.registry, model)))


def describe(app: FastAPI, model: ServedModel) -> dict[str, Any]:
    """The response for one bundle."""
    reloader: Reloader = app.state.reloader
    settings: Settings = app.state.settings
    manifest = model.manifest
    created = datetime.fromisoformat(manifest.provenance.created)
    recommended = manifest.recommended_steps
    return {
        "id": manifest.name,
        "object": "model",
        "created": int(created.replace(tzinfo=created.tzinfo or UTC).timestamp()),
        "owned_by": "concord",
        "version": manifest.version,
        "state": reloader.state(model),
        "latent": manifest.latent,
        "modalities": [_modality(m, manifest.galleries.get(m.name)) for m in manifest.modalities],
        "capabilities": ["embed", "cross-generate", "refine"],
        "recommended_refine_steps": None if recommended is None else min(recommended, settings.max_refine_steps),
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_items": settings.max_items,
            "max_pixels": settings.max_pixels,
            "max_audio_seconds": settings.max_audio_seconds,
            "max_samples": settings.max_samples,
            "max_refine_steps": settings.max_refine_steps,
            "request_timeout_ms": settings.request_timeout_ms,
        },
        "provenance": {
            "sha256": model.runtime.bundle.sha256,
            **manifest.provenance.model_dump(mode="json"),
            "metrics": manifest.metrics,
        },
    }


def _modality(modality: Modality, gallery: GalleryFacts | None) -> dict[str, Any]:
    facts = {**modality.model_dump(mode="json", exclude_none=True), "shape": list(modality.shape)}
    if gallery is not None:
        facts["gallery"] = {"rows": gallery.rows, "values": gallery.values}
    accepted = media_types(modality)
    return {**facts, "media_types": list(accepted)} if accepted else facts


def _respond(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
