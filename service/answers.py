"""Outcomes turned into the bodies of answers: plain dictionaries, serialised once, with NumPy arrays left to orjson."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float32

from model import codec
from model.manifest import Manifest
from service.calls import Item, Rejected
from service.engine import Outcome, Refinement
from service.schemas import EmbedOptions, GenerateOptions

Result = tuple[Item, Outcome]
Vector = Float32[np.ndarray, " latent"]


def embed(
    manifest: Manifest, options: EmbedOptions, results: Sequence[Result], rejected: Sequence[Rejected], request_id: str
) -> bytes:
    """The body of POST /embed."""
    data = [_failed(one, request_id) for one in rejected]
    for item, outcome in results:
        vector = outcome.mean
        if options.representation == "sample":
            assert outcome.sample is not None
            vector = outcome.sample
        if options.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), float(np.finfo(np.float32).tiny))
        data.append(
            {
                "object": "embedding",
                "index": item.index,
                "id": item.id,
                "embedding": _vector(vector, options.encoding_format),
                "log_var": _vector(outcome.log_var, options.encoding_format)
                if options.representation == "mean_log_var"
                else None,
                "modalities": list(item.row),
                "refinement": _refinement(outcome.refinement, options.refine.trace),
            }
        )
    items = [item for item, _ in results]
    usage = {
        "items": len(items),
        "images": sum(item.images for item in items),
        "text_characters": sum(item.text_characters for item in items),
        "refine_steps": _steps(results),
    }
    return _dump(manifest, data, usage, dimensions=manifest.latent)


def embeddings(manifest: Manifest, encoding_format: str, results: Sequence[Result]) -> bytes:
    """The body of POST /v1/embeddings. A token of this service's texts is a character."""
    data = [
        {"object": "embedding", "index": item.index, "embedding": _vector(outcome.mean, encoding_format)}
        for item, outcome in results
    ]
    tokens = sum(item.text_characters for item, _ in results)
    answer = {
        "object": "list",
        "model": manifest.name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def generate(
    manifest: Manifest, options: GenerateOptions, results: Sequence[Result], rejected: Sequence[Rejected], request_id: str
) -> bytes:
    """The body of POST /cross-generate. Encodes pictures, so it belongs in a worker thread."""
    modalities = {m.name: m for m in manifest.modalities}
    data = [_failed(one, request_id) for one in rejected]
    for item, outcome in results:
        generated = {
            name: [codec.encode(modalities[name], row, image_format=options.output.image) for row in rows]
            for name, rows in outcome.generated.items()
        }
        data.append(
            {
                "index": item.index,
                "id": item.id,
                "modalities": list(item.row),
                "generated": generated,
                "embedding": _vector(outcome.mean, options.encoding_format) if options.return_embedding else None,
                "refinement": _refinement(outcome.refinement, options.refine.trace),
            }
        )
    usage = {
        "items": len(results),
        "generated": sum(len(rows) for _, outcome in results for rows in outcome.generated.values()),
        "refine_steps": _steps(results),
    }
    return _dump(manifest, data, usage)


def _dump(manifest: Manifest, data: list[dict[str, Any]], usage: dict[str, int], **more: int) -> bytes:
    data.sort(key=lambda one: int(one["index"]))
    head = {"object": "list", "model": manifest.name, "model_version": manifest.version, **more}
    return orjson.dumps({**head, "data": data, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY)


def _failed(one: Rejected, request_id: str) -> dict[str, Any]:
    return {"index": one.index, "id": one.id, "error": one.problem.body(request_id)}


def _vector(vector: Vector, encoding_format: str) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.ascontiguousarray(vector)


def _refinement(refinement: Refinement | None, trace: bool) -> dict[str, Any] | None:
    if refinement is None:
        return None
    told = {
        "steps": refinement.steps,
        "objective": refinement.objective,
        "before": refinement.before,
        "after": refinement.after,
        "stopped": refinement.stopped,
    }
    return {**told, "trace": refinement.trace} if trace else told


def _steps(results: Sequence[Result]) -> int:
    return sum(outcome.refinement.steps for _, outcome in results if outcome.refinement is not None)
