"""Inference results as response bodies: plain dictionaries, serialised once, with NumPy arrays left to orjson."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float32
from numpy.typing import NDArray

from concord.model import codec
from concord.model.bundle.manifest import Manifest
from concord.model.gallery import Gallery
from concord.model.modality import Modality
from concord.service.api.parse_pool import StillWanted
from concord.service.api.requests import ParsedItem, RejectedItem
from concord.service.api.schemas import EmbedOptions, GenerateOptions
from concord.service.errors import Problem
from concord.service.inference.jobs import InferenceResult, RefinementResult
from concord.service.inference.served_model import ServedModel

ItemResult = tuple[ParsedItem, InferenceResult]
Vector = Float32[np.ndarray, " latent"]
STAGES = ("queue", "features", "encode", "refine", "generate")
"""Of an item, after it was parsed with all others of its request."""


def embed(
    manifest: Manifest, options: EmbedOptions, results: Sequence[ItemResult], rejected: Sequence[RejectedItem], request_id: str
) -> bytes:
    """The body of POST /embed."""
    data = [_failed(one, request_id) for one in rejected]
    for item, result in results:
        vector = result.mean
        if options.representation == "sample":
            assert result.sample is not None
            vector = result.sample
        if options.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), float(np.finfo(np.float32).tiny))
        data.append(
            {
                "object": "embedding",
                "index": item.index,
                "id": item.id,
                "embedding": _vector(vector, options.encoding_format),
                "log_var": _vector(result.log_var, options.encoding_format)
                if options.representation == "mean_log_var"
                else None,
                "modalities": list(item.row),
                "refinement": _refinement(result.refinement, options.refine.trace),
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


def embeddings(manifest: Manifest, encoding_format: str, results: Sequence[ItemResult]) -> bytes:
    """The body of POST /v1/embeddings. A token of this service's texts is a character."""
    data = [
        {"object": "embedding", "index": item.index, "embedding": _vector(result.mean, encoding_format)}
        for item, result in results
    ]
    tokens = sum(item.text_characters for item, _ in results)
    body = {
        "object": "list",
        "model": manifest.name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def generate(
    model: ServedModel,
    options: GenerateOptions,
    results: Sequence[ItemResult],
    rejected: Sequence[RejectedItem],
    request_id: str,
    wanted: StillWanted,
) -> bytes:
    """The body of POST /cross-generate. It compresses pictures, computes waveforms and searches galleries: call it in a worker
    thread.

    Raises:
        Problem: the client is gone: a request may ask for 256 sounds, each of which takes a tenth of a second or more.
    """
    modalities = {m.name: m for m in model.manifest.modalities}

    def render(name: str, row: NDArray[Any]) -> dict[str, Any]:
        if not wanted():
            raise Problem("client_gone", "the client closed the connection")
        return _render(modalities[name], row, options)

    data = [_failed(one, request_id) for one in rejected]
    for item, result in results:
        generated = {name: [render(name, row) for row in rows] for name, rows in result.generated.items()}
        data.append(
            {
                "index": item.index,
                "id": item.id,
                "modalities": list(item.row),
                "generated": generated,
                "embedding": _vector(result.mean, options.encoding_format) if options.return_embedding else None,
                "refinement": _refinement(result.refinement, options.refine.trace),
                **({"nearest": _nearest(model.galleries, result, options.nearest)} if options.nearest else {}),
            }
        )
    usage = {
        "items": len(results),
        "generated": sum(len(rows) for _, result in results for rows in result.generated.values()),
        "refine_steps": _steps(results),
    }
    return _dump(model.manifest, data, usage)


def _nearest(galleries: Mapping[str, Gallery], result: InferenceResult, count: int) -> dict[str, list[dict[str, Any]]]:
    """The training examples that are nearest to the posterior mean, by target."""
    return {
        name: [
            {"id": gallery.ids[row], "similarity": similarity, "values": gallery.values(row)}
            for row, similarity in gallery.nearest(result.mean, count)
        ]
        for name in result.generated
        if (gallery := galleries.get(name)) is not None
    }


def _render(modality: Modality, row: NDArray[Any], options: GenerateOptions) -> dict[str, Any]:
    output = options.output
    return codec.render(
        modality,
        row,
        image_format=output.image,
        audio_format=output.audio,
        spectrogram=output.spectrogram,
        seed=options.seed,
    )


def _dump(manifest: Manifest, data: list[dict[str, Any]], usage: dict[str, int], **more: int) -> bytes:
    data.sort(key=lambda one: int(one["index"]))
    head = {"object": "list", "model": manifest.name, "model_version": manifest.version, **more}
    return orjson.dumps({**head, "data": data, "usage": usage}, option=orjson.OPT_SERIALIZE_NUMPY)


def _failed(one: RejectedItem, request_id: str) -> dict[str, Any]:
    return {"index": one.index, "id": one.id, "error": one.problem.body(request_id)}


def _vector(vector: Vector, encoding_format: str) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.ascontiguousarray(vector)


def _refinement(refinement: RefinementResult | None, trace: bool) -> dict[str, Any] | None:
    if refinement is None:
        return None
    body = {
        "steps": refinement.steps,
        "objective": refinement.objective,
        "before": refinement.before,
        "after": refinement.after,
        "stopped": refinement.stopped,
    }
    return {**body, "trace": refinement.trace} if trace else body


def _steps(results: Sequence[ItemResult]) -> int:
    return sum(result.refinement.steps for _, result in results if result.refinement is not None)


def stage_seconds(results: Sequence[ItemResult]) -> dict[str, float]:
    """Seconds by stage: of items that ran at the same time the slowest counts."""
    if len(results) == 1:
        return results[0][1].stage_seconds
    return {stage: max((result.stage_seconds[stage] for _, result in results), default=0.0) for stage in STAGES}
