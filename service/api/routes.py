"""POST /embed and POST /cross-generate."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from concord.service.api import responses
from concord.service.api.rejections import problem_from
from concord.service.api.requests import O, ParsedItem, ParsedRequest, RejectedItem, parse
from concord.service.api.responses import ItemResult
from concord.service.api.schemas import CallOptions, EmbedAnswer, EmbedOptions, GenerateAnswer, GenerateOptions
from concord.service.errors import Fault, Problem
from concord.service.inference.jobs import (
    EngineFailed,
    InferenceJob,
    InferenceResult,
    ModelNotReady,
    QueueFull,
    RefinementLimits,
)
from concord.service.inference.registry import ModelRegistry, UnknownModel
from concord.service.inference.served_model import ServedModel
from concord.service.request_state import header, state_of
from concord.service.settings import Settings

TIMEOUT_HEADER = b"x-request-timeout-ms"
NO_REFINEMENT = RefinementLimits()
DEADLINE_SHARE = 0.9
"""Refinement with a budget ends when this share of the deadline is spent: what follows takes time too."""

router = APIRouter()


@router.post("/embed", response_model=EmbedAnswer, summary="Embed any subset of modalities")
async def embed(request: Request) -> Response:
    """One embedding for each item, from the modalities that it has. Also takes one item as multipart/form-data, with a part per
    modality and the options as query parameters or in a part named options."""
    async with deadline(request) as until:
        parsed = await parse(request, EmbedOptions)
        options = parsed.options
        sample = options.representation == "sample"
        jobs = [
            InferenceJob(item.row, options.seed, item.index, refinement_limits(options, until), sample_embedding=sample)
            for item in parsed.accepted
        ]
        model, results = await run(request, parsed, jobs)
        with serializing(request):
            content = responses.embed(model.manifest, options, results, parsed.rejected, state_of(request.scope).request_id)
    return respond(request, content, results, parsed.parse_seconds)


@router.post("/cross-generate", response_model=GenerateAnswer, summary="Generate modalities from those that are present")
async def cross_generate(request: Request) -> Response:
    """Values of the target modalities for each item. Also takes one item as multipart/form-data, as /embed does."""
    async with deadline(request) as until:
        parsed, targets = _with_targets(request, await parse(request, GenerateOptions))
        options = parsed.options
        jobs = [
            InferenceJob(
                item.row,
                options.seed,
                item.index,
                refinement_limits(options, until),
                targets=targets[item.index],
                num_samples=options.num_samples,
                latent=options.latent,
                temperature=options.temperature,
                text_temperature=options.text.temperature,
                top_p=options.text.top_p,
            )
            for item in parsed.accepted
        ]
        model, results = await run(request, parsed, jobs)
        with serializing(request):
            request_id = state_of(request.scope).request_id
            content = await request.app.state.parse_pool.while_wanted(
                functools.partial(responses.generate, model, options, results, parsed.rejected, request_id)
            )
    return respond(request, content, results, parsed.parse_seconds)


def _with_targets(
    request: Request, parsed: ParsedRequest[GenerateOptions]
) -> tuple[ParsedRequest[GenerateOptions], dict[int, tuple[str, ...]]]:
    """The targets of each item: those of the request, or the modalities that the item lacks. An item that lacks none is
    rejected."""
    settings: Settings = request.app.state.settings
    names = [m.name for m in parsed.model.runtime.modalities]
    requested = parsed.options.targets
    for place, name in enumerate(requested or ()):
        if name not in names or name in (requested or ())[:place]:
            reason = "is named twice" if name in names else "is no modality of this model"
            code = "invalid_value" if name in names else "unknown_modality"
            raise Problem.from_faults(
                [Fault(f"/targets/{place}", code, f"{name[:64]!r} {reason}: there are {', '.join(names)}")]
            )
    galleries = parsed.model.galleries
    if parsed.options.nearest and not galleries.keys() & set(requested or names):
        found = f"has training examples of {', '.join(galleries)} only" if galleries else "has no training examples"
        detail = f"the bundle {found}: leave nearest out{' or name such a target' if galleries else ''}"
        raise Problem.from_faults([Fault("/nearest", "no_gallery", detail)])
    targets: dict[int, tuple[str, ...]] = {}
    items: list[ParsedItem | RejectedItem] = []
    for item in parsed.items:
        if isinstance(item, ParsedItem):
            targets[item.index] = tuple(requested or (name for name in names if name not in item.row))
            if not targets[item.index]:
                detail = "nothing to generate: every modality is present. Name targets to reconstruct some"
                problem = Problem.from_faults([Fault(f"/inputs/{item.index}", "nothing_to_generate", detail)])
                items.append(RejectedItem(item.index, item.id, problem))
                continue
        items.append(item)
    values = parsed.options.num_samples * sum(map(len, targets.values()))
    if values > settings.max_samples:
        detail = f"{values} values (items x targets x num_samples); at most {settings.max_samples} in one request"
        raise Problem.from_faults([Fault("/num_samples", "out_of_range", detail)])
    examples = parsed.options.nearest * sum(name in galleries for found in targets.values() for name in found)
    if examples > settings.max_samples:
        detail = f"{examples} examples (items x targets with a gallery x nearest); at most {settings.max_samples} are allowed"
        raise Problem.from_faults([Fault("/nearest", "out_of_range", detail)])
    return replace(parsed, items=items), targets


async def run(request: Request, parsed: ParsedRequest[O], jobs: list[InferenceJob]) -> tuple[ServedModel, list[ItemResult]]:
    """The results of the accepted items, and the model that made them.

    Raises:
        Problem: an item was rejected and the request wants all or nothing; the queue is full; inference failed.
    """
    app, state = request.app.state, state_of(request.scope)
    if parsed.rejected and parsed.options.on_error == "fail":
        raise Problem.from_faults([fault for item in parsed.rejected for fault in item.problem.faults])
    for rejected in parsed.rejected:
        app.metrics.rejections.labels(rejected.problem.code).inc()
    model = _current(app.registry, parsed)
    state.model_version = model.manifest.version
    state.submitted_ns = time.time_ns()
    try:
        results = await _run_in_chunks(model, jobs, app.settings.max_items, alone=state.alone)
    except (QueueFull, EngineFailed, ModelNotReady) as error:
        raise problem_from(error, app.settings) from error
    finally:
        app.metrics.stage("decode", parsed.parse_seconds)
    for item in parsed.accepted:
        app.metrics.item("+".join(item.row))
    return model, list(zip(parsed.accepted, results, strict=True))


async def _run_in_chunks(model: ServedModel, jobs: list[InferenceJob], size: int, *, alone: bool) -> list[InferenceResult]:
    """The results of all jobs. Only a list of texts has more than one chunk: later chunks wait while the queue is full.

    Raises:
        QueueFull: the first chunk does not fit now; no job was accepted.
        EngineFailed, ModelNotReady: as ``ServedModel.run``.
    """
    results = await model.run(jobs[:size], alone=alone)
    for start in range(size, len(jobs), size):
        while True:
            try:
                results += await model.run(jobs[start : start + size])
                break
            except QueueFull as full:
                await asyncio.sleep(full.retry_after_ms / 1000)
    return results


def _current(registry: ModelRegistry, parsed: ParsedRequest[O]) -> ServedModel:
    """The model that serves the request now: it may have been replaced while the request was parsed."""
    try:
        return registry.current(parsed.model, parsed.options.model)
    except UnknownModel as error:
        raise Problem("unknown_model", str(error)) from error


class deadline:  # noqa: N801 - a context manager
    """Cancels the request when its time is up: the server's limit, or a shorter one that the client sets. Yields when a
    refinement with a budget should end, in monotonic seconds."""

    def __init__(self, request: Request) -> None:
        settings: Settings = request.app.state.settings
        requested = header(request.scope, TIMEOUT_HEADER, default=str(settings.request_timeout_ms))
        if not (requested.isascii() and requested.isdigit() and int(requested[:16]) > 0):
            detail = f"X-Request-Timeout-Ms must be a positive whole number, received {requested[:32]!r}"
            raise Problem("invalid_value", detail)
        self._limit = min(settings.request_timeout_ms, int(requested[:16]))
        self._timeout = asyncio.timeout(self._limit / 1000)

    async def __aenter__(self) -> float:
        await self._timeout.__aenter__()
        return time.monotonic() + DEADLINE_SHARE * self._limit / 1000

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as timeout:
            detail = f"no result within {self._limit} ms: send fewer items or ask for fewer steps"
            raise Problem("deadline_passed", detail) from timeout


@contextlib.contextmanager
def serializing(request: Request) -> Iterator[None]:
    """Measures the time that the response takes to be written."""
    started = time.perf_counter()
    yield
    request.app.state.metrics.stage("serialize", time.perf_counter() - started)


def refinement_limits(options: CallOptions, until: float) -> RefinementLimits:
    """A request with a budget gets the best posterior in time rather than a 504."""
    requested = options.refine
    if not requested.steps:
        return NO_REFINEMENT
    return RefinementLimits(
        steps=requested.steps,
        tolerance=requested.tolerance,
        budget_ms=requested.budget_ms,
        until=until if requested.budget_ms is not None else None,
        trace=requested.trace,
    )


def respond(request: Request, content: bytes, results: list[ItemResult], parse_seconds: float) -> Response:
    """The response, with Server-Timing in milliseconds: of items that ran at the same time the slowest counts."""
    seconds = {"decode": parse_seconds, **responses.stage_seconds(results)}
    state_of(request.scope).stage_seconds = seconds
    timing = ", ".join(f"{stage};dur={1000 * spent:.2f}" for stage, spent in seconds.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})
