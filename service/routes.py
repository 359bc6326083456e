"""POST /embed and POST /cross-generate."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from service import answers, body
from service.answers import Result
from service.calls import Call, Item, Rejected
from service.engine import EngineFailed, Outcome, QueueFull, Refine, Work
from service.errors import Fault, Problem
from service.schemas import CallOptions, EmbedAnswer, EmbedOptions, GenerateAnswer, GenerateOptions
from service.serving import Serving

TIMEOUT_HEADER = "x-request-timeout-ms"
RETRY_AFTER_MS = 250
STAGES = ("queue", "decode", "encode", "refine", "generate")

O = TypeVar("O", bound=CallOptions)  # noqa: E741

router = APIRouter()


@router.post("/embed", response_model=EmbedAnswer, summary="Embed any subset of modalities")
async def embed(request: Request) -> Response:
    """One embedding for each item, from whatever modalities it has. Also takes one sample as multipart/form-data, a part per
    modality, with the options as query parameters or in a part named options."""
    serving: Serving = request.app.state.serving
    async with deadline(request, serving):
        call, decode_seconds = await _read(request, serving, EmbedOptions)
        options = call.options
        sample = options.representation == "sample"
        works = [
            Work(item.row, options.seed, item.index, _refine(options), sample_embedding=sample)
            for item in call.items
            if isinstance(item, Item)
        ]
        results = await run(request, serving, call, works)
        started = time.perf_counter()
        content = answers.embed(serving.manifest, options, results, _rejected(call), request.state.request_id)
        serving.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, content, results, decode_seconds)


@router.post("/cross-generate", response_model=GenerateAnswer, summary="Generate modalities from those that are there")
async def cross_generate(request: Request) -> Response:
    """Values of the target modalities for each item. Also takes one sample as multipart/form-data, as /embed does."""
    serving: Serving = request.app.state.serving
    async with deadline(request, serving):
        call, decode_seconds = await _read(request, serving, GenerateOptions)
        options = call.options
        call, targets = _aim(serving, call)
        works = [
            Work(
                item.row,
                options.seed,
                item.index,
                _refine(options),
                targets=targets[item.index],
                num_samples=options.num_samples,
                latent=options.latent,
                temperature=options.temperature,
            )
            for item in call.items
            if isinstance(item, Item)
        ]
        results = await run(request, serving, call, works)
        started = time.perf_counter()
        content = await serving.in_thread(
            answers.generate, serving.manifest, options, results, _rejected(call), request.state.request_id
        )
        serving.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, content, results, decode_seconds)


async def _read(request: Request, serving: Serving, options: type[O]) -> tuple[Call[O], float]:
    serving.require_ready()
    content = await body.read(request, serving.settings.max_body_bytes)
    query = request.query_params.multi_items()
    return await decode(serving, lambda: serving.reader.read(content, query, options, request.state.charge))


async def decode(serving: Serving, read: Callable[[], Call[O]]) -> tuple[Call[O], float]:
    """The call, and the seconds it took to decode. One hop to a thread for all items: a hop costs more than one."""
    started = time.perf_counter()
    call = await serving.in_thread(read)
    seconds = time.perf_counter() - started
    serving.metrics.stage("decode", seconds)
    if call.options.model is not None:
        serving.require_name(call.options.model)
    return call, seconds


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
    if wanted > serving.settings.max_samples:
        detail = f"{wanted} values (items x targets x num_samples); at most {serving.settings.max_samples} in one request"
        raise Problem.of([Fault("/num_samples", "out_of_range", detail)])
    return Call(call.options, items), targets


async def run(request: Request, serving: Serving, call: Call[O], works: list[Work]) -> list[Result]:
    """The results of the items that were not rejected.

    Raises:
        Problem: an item was rejected and the caller wants all or nothing; the queue is full; the engine failed.
    """
    rejected = _rejected(call)
    if rejected and call.options.on_error == "fail":
        faults = [fault for one in rejected for fault in one.problem.faults]
        raise Problem.of(faults)
    for one in rejected:
        serving.metrics.rejections.labels(one.problem.code).inc()
    items = [item for item in call.items if isinstance(item, Item)]
    try:
        if call.options.refine.steps:
            outcomes = await _unless_gone(request, serving.engine.submit(works))
        else:
            outcomes = await serving.engine.submit(works)
    except QueueFull as error:
        raise Problem("queue_full", str(error), retry_after_ms=error.retry_after_ms) from error
    except EngineFailed as error:
        raise Problem("engine_failed", "inference failed: it may succeed later", retry_after_ms=RETRY_AFTER_MS) from error
    for item in items:
        serving.metrics.items.labels("+".join(item.row)).inc()
    return list(zip(items, outcomes, strict=True))


async def _unless_gone(request: Request, submission: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """The outcomes, or an early end of the work when nobody waits for it any more. Only refinement lasts that long."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(submission), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Problem("client_gone", "the client closed the connection")
        return work.result()
    finally:
        work.cancel()
        watch.cancel()


@contextlib.asynccontextmanager
async def deadline(request: Request, serving: Serving) -> AsyncIterator[None]:
    """Ends the work when its time is up: the server's limit, or a shorter one that the caller names."""
    limit = serving.settings.request_timeout_ms
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is not None:
        if not (asked.isascii() and asked.isdigit() and int(asked[:16]) > 0):
            raise Problem("invalid_value", f"X-Request-Timeout-Ms must be a positive whole number, received {asked[:32]!r}")
        limit = min(limit, int(asked[:16]))
    try:
        async with asyncio.timeout(limit / 1000):
            yield
    except TimeoutError as error:
        raise Problem("deadline_passed", f"no answer within {limit} ms: send fewer items or ask for fewer steps") from error


def _refine(options: CallOptions) -> Refine:
    asked = options.refine
    return Refine(steps=asked.steps, tolerance=asked.tolerance, budget_ms=asked.budget_ms, trace=asked.trace)


def _rejected(call: Call[O]) -> list[Rejected]:
    return [item for item in call.items if isinstance(item, Rejected)]


def answer(request: Request, content: bytes, results: Sequence[Result], decode_seconds: float) -> Response:
    """With Server-Timing in milliseconds: of items that ran side by side the slowest counts."""
    request.state.spent = spent = {
        stage: max((outcome.timings.get(stage, 0.0) for _, outcome in results), default=0.0) for stage in STAGES
    }
    spent["decode"] = decode_seconds
    timing = ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in spent.items())
    return Response(content, media_type="application/json", headers={"Server-Timing": timing})
