"""Health checks and metrics: for orchestrators, balancers and Prometheus."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from concord.service.api.schemas import HealthAnswer
from concord.service.inference.registry import ModelRegistry
from concord.service.telemetry.metrics import Metrics
from concord.service.workers.channel import ChannelError
from concord.service.workers.link import SupervisorLink

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])
HEALTH_PATHS = frozenset({"/livez", "/healthz", "/v2/health/live", "/readyz", "/v2/health/ready"})
"""They need no key."""

_FAILING: dict[int | str, dict[str, Any]] = {503: {"model": HealthAnswer, "description": "A check fails."}}


class Health:
    """What the health routes report."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self.draining = False
        """Set once: the process will end, and must get no more requests."""

    def liveness(self) -> dict[str, str]:
        """The checks of /livez, each "ok" or what is wrong. Never depends on load."""
        return self._registry.liveness()

    def readiness(self) -> dict[str, str]:
        """The checks of /readyz, each "ok" or what is wrong."""
        return {"accepting": "the server is stopping" if self.draining else "ok", **self._registry.checks()}

    def ready(self) -> bool:
        return all(result == "ok" for result in self.readiness().values())


@router.get("/livez", response_model=HealthAnswer, responses=_FAILING, summary="Is the process alive?")
@router.get("/healthz", response_model=HealthAnswer, responses=_FAILING, summary="The same as /livez")
@router.get("/v2/health/live", response_model=HealthAnswer, responses=_FAILING, summary="The same as /livez, for KServe")
async def live(request: Request) -> Response:
    """The event loop runs, as this response shows, and every inference thread has a heartbeat. Never depends on load."""
    health: Health = request.app.state.health
    link: SupervisorLink | None = request.app.state.link
    return _respond(health.liveness() if link is None else await link.liveness())


@router.get("/readyz", response_model=HealthAnswer, responses=_FAILING, summary="May requests be sent here?")
@router.get("/v2/health/ready", response_model=HealthAnswer, responses=_FAILING, summary="The same as /readyz, for KServe")
async def ready(request: Request) -> Response:
    """Bundles loaded, graphs warmed up, golden examples replayed, heartbeats present, circuits closed, and not stopping."""
    health: Health = request.app.state.health
    link: SupervisorLink | None = request.app.state.link
    return _respond(health.readiness() if link is None or health.draining else await link.readiness())


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request) -> Response:
    """Base units, counters end in _total."""
    observed: Metrics = request.app.state.metrics
    link: SupervisorLink | None = request.app.state.link
    try:
        content = observed.expose() if link is None else await link.metrics()
    except (ChannelError, TimeoutError):
        return Response("the supervisor does not respond\n", status_code=503, media_type="text/plain")
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _respond(checks: dict[str, str]) -> Response:
    ok = all(result == "ok" for result in checks.values())
    content = orjson.dumps({"status": "ok" if ok else "failing", "checks": checks})
    return Response(content, status_code=200 if ok else 503, media_type="application/json")
