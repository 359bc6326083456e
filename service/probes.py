"""What probes and scrapers ask: alive, ready, metrics."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.bundles import Bundles
from service.schemas import HealthAnswer

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])
OPEN = frozenset({"/livez", "/healthz", "/v2/health/live", "/readyz", "/v2/health/ready"})
"""Probes have no key."""

_FAILING: dict[int | str, dict[str, Any]] = {503: {"model": HealthAnswer, "description": "A check fails."}}


@router.get("/livez", response_model=HealthAnswer, responses=_FAILING, summary="Is the process alive?")
@router.get("/healthz", response_model=HealthAnswer, responses=_FAILING, summary="The same as /livez")
@router.get("/v2/health/live", response_model=HealthAnswer, responses=_FAILING, summary="The same as /livez, for KServe")
async def live(request: Request) -> Response:
    """The event loop turns, as this answer shows, and every inference thread beats. Never depends on load."""
    bundles: Bundles = request.app.state.bundles
    return _answer(bundles.liveness())


@router.get("/readyz", response_model=HealthAnswer, responses=_FAILING, summary="May requests be sent here?")
@router.get("/v2/health/ready", response_model=HealthAnswer, responses=_FAILING, summary="The same as /readyz, for KServe")
async def ready(request: Request) -> Response:
    """Bundles loaded, graphs warmed, golden examples replayed, inference threads beating, circuits closed, and not stopping."""
    bundles: Bundles = request.app.state.bundles
    return _answer(bundles.checks())


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Base units, counters end in _total."""
    bundles: Bundles = request.app.state.bundles
    return Response(bundles.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


def _answer(checks: dict[str, str]) -> Response:
    ok = all(answer == "ok" for answer in checks.values())
    content = orjson.dumps({"status": "ok" if ok else "failing", "checks": checks})
    return Response(content, status_code=200 if ok else 503, media_type="application/json")
