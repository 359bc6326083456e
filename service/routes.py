"""POST /embed and POST /cross-generate."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from model.manifest import Manifest
from service import answers, body
from service.answers import Result
from service.bundles import Bundles
from service.calls import Call, Item, Rejected, Wanted, parse
from service.engine import Refine, Work
from service.errors import Fault, Problem
from service.schemas import CallOptions, EmbedAnswer, EmbedOptions, GenerateAnswer, GenerateOptions
from service.serving import Serving
from service.settings import Settings

TIMEOUT_HEADER = "x-request-timeout-ms"
UNREFINED = Refine()
EARLY = 0.9
"""Refinement with a budget ends when this part of the deadline is spent: what follows takes time too."""
STAGES = ("queue", "encode", "refine", "generate")
"""Of an item, after it was decoded with all others of its request."""

O = TypeVar("O", bound=CallOptions)  # noqa: E741

router = APIRouter()


@router.post("/embed", response_model=EmbedAnswer, summary="Embed any subset of modalities")
async def embed(request: Request) -> Response:
    """One embedding for each item, from whatever modalities it has. Also takes one sample as multipart/form-data, a part per
    modality, with the options as query parameters or in a part named options."""
    bundles: Bundles = request.app.state.bundles
    async with deadline(request, bundles.settings) as until:
        serving, call, decode_seconds = await _read(request, bundles, EmbedOptions)
        options = call.options
        sample = options.representation == "sample"
        works = [
            Work(item.row, options.seed, item.index, _refine(options, until), sample_embedding=sample)
            for item in call.items
            if isinstance(item, Item)
        ]
        manifest, results = await run(request, bundles, serving, call, works)
        started = time.perf_counter()
        content = answers.embed(manifest, options, results, _rejected(call), request.state.request_id)
        bundles.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, content, results, decode_seconds)


@router.post("/cross-generate", response_model=GenerateAnswer, summary="Generate modalities from those that are there")
async def cross_generate(request: Request) -> Response:
    """Values of the target modalities for each item. Also takes one sample as multipart/form-data, as /embed does."""
    bundles: Bundles = request.app.state.bundles
    async with deadline(request, bundles.settings) as until:
        serving, call, decode_seconds = await _read(request, bundles, GenerateOptions)
        options = call.options
        call, targets = _aim(serving, call)
        works = [
            Work(
                item.row,
                options.seed,
                item.index,
                _refine(options, until),
                targets=targets[item.index],
                num_samples=options.num_samples,
                latent=options.latent,
                temperature=options.temperature,
            )
            for item in call.items
            if isinstance(item, Item)
        ]
        manifest, results = await run(request, bundles, serving, call, works)
        started = time.perf_counter()
        content = await bundles.decoding.in_thread(
            answers.generate, manifest, options, results, _rejected(call), request.state.request_id
        )
        bundles.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, content, results, decode_seconds)


async def _read(request: Request, bundles: Bundles, options: type[O]) -> tuple[Serving, Call[O], float]:
    """The bundle, the call, and the seconds it took to decode. One hop to a thread for all items: a hop costs more than one."""
    bundles.admit()
    content = await body.read(request, bundles.settings.max_body_bytes)
    query = request.query_params.multi_items() if request.scope["query_string"] else ()

    def read(wanted: Wanted, quickly: bool) -> tuple[Serving, Call[O]]:
        asked = parse(content, query, options, bundles.most_values)
        serving = bundles.choose(asked.options.model)
        serving.admit()  # others may be idle, which is why this came so far
        return serving, serving.reader.read(asked, request.state.charge, wanted, quickly=quickly)

    (serving, call), seconds = await bundles.decoding.decode(read, len(content))
    return serving, call, seconds


def _aim(serving: Serving, call: Call[GenerateOptions]) -> tuple[Call[GenerateOptions], dict[int, tuple[str, ...]]]:
    """The targets of each item: those that were named, or the modalities it lacks."""
    names = [m.name for m in serving.runtime.modalities]
    asked = call.options.targets
    for place, name in enumerate(asked or ()):
        if name not in names or name in (asked or ())[:place]:
            why = "is named twice" if name in names else "is no modality of this model"
            detail = f"{name[:64]!r} {why}: there are {', '.join(names)}"
            raise Problem.of([Fault(f"/targets/{place}", "unknown_modality" if name not in names else "invalid_value", detail)])
    targets: dict[int, tuple[str, ...]] = {}
    items: list[Item | Rejected] = []
    for item in call.items:
        if isinstance(item, Item):
            targets[item.index] = tuple(asked or (name for name in names if name not in item.row))
            if not targets[item.index]:
                detail = "nothing to generate: every modality is present. Name targets to reconstruct some"
                problem = Problem.of([Fault(f"/inputs/{item.index}", "nothing_to_generate", detail)])
                items.append(Rejected(item.index, item.id, problem))
                continue
        items.append(item)
    wanted = call.options.num_samples * sum(map(len, targets.values()))
    most = serving.settings.max_samples
    if wanted > most:
        detail = f"{wanted} values (items x targets x num_samples); at most {most} in one request"
        raise Problem.of([Fault("/num_samples", "out_of_range", detail)])
    return Call(call.options, items), targets


async def run(
    request: Request, bundles: Bundles, chosen: Serving, call: Call[O], works: list[Work]
) -> tuple[Manifest, list[Result]]:
    """The results of the items that were not rejected, and the manifest of the bundle they are of.

    Raises:
        Problem: an item was rejected and the caller wants all or nothing; the queue is full; the engine failed.
    """
    rejected = _rejected(call)
    if rejected and call.options.on_error == "fail":
        faults = [fault for one in rejected for fault in one.problem.faults]
        raise Problem.of(faults)
    for one in rejected:
        bundles.metrics.rejections.labels(one.problem.code).inc()
    items = [item for item in call.items if isinstance(item, Item)]
    serving = bundles.current(chosen, call.options.model)
    request.state.model_version = serving.manifest.version
    request.state.submitted_ns = time.time_ns()
    outcomes = await serving.submit(works)
    for item in items:
        bundles.metrics.items.labels("+".join(item.row)).inc()
    return serving.manifest, list(zip(items, outcomes, strict=True))


@contextlib.asynccontextmanager
async def deadline(request: Request, settings: Settings) -> AsyncIterator[float]:
    """Ends the work when its time is up: the server's limit, or a shorter one that the caller names. Yields when whatever can
    end early should, in monotonic seconds."""
    limit = settings.request_timeout_ms
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is not None:
        if not (asked.isascii() and asked.isdigit() and int(asked[:16]) > 0):
            raise Problem("invalid_value", f"X-Request-Timeout-Ms must be a positive whole number, received {asked[:32]!r}")
        limit = min(limit, int(asked[:16]))
    try:
        async with asyncio.timeout(limit / 1000):
            yield time.monotonic() + EARLY * limit / 1000
    except TimeoutError as error:
        raise Problem("deadline_passed", f"no answer within {limit} ms: send fewer items or ask for fewer steps") from error


def _refine(options: CallOptions, until: float) -> Refine:
    """Who names a budget wants the best there is in time rather than a 504."""
    asked = options.refine
    if not asked.steps:
        return UNREFINED
    return Refine(
        steps=asked.steps,
        tolerance=asked.tolerance,
        budget_ms=asked.budget_ms,
        until=until if asked.budget_ms is not None else None,
        trace=asked.trace,
    )


def _rejected(call: Call[O]) -> list[Rejected]:
    return [item for item in call.items if isinstance(item, Rejected)]


def answer(request: Request, content: bytes, results: Sequence[Result], decode_seconds: float) -> Response:
    """With Server-Timing in milliseconds: of items that ran side by side the slowest counts."""
    timings = [outcome.timings for _, outcome in results]
    spent = timings[0] if len(timings) == 1 else {stage: max((one[stage] for one in timings), default=0.0) for stage in STAGES}
    request.state.spent = spent = {"decode": decode_seconds, **spent}
    timing = ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in spent.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})
