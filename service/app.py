"""The ASGI application: routes, the layers around them, and the life of what they serve."""

import contextlib
import platform
import socket
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from model.modality import Modality
from model.runtime import VERSION, Runtime
from service import admin, contract, embeddings, models, probes, routes, site, tracing
from service.access import Access
from service.body import BodyLimit
from service.bundles import Bundles
from service.direct import Direct
from service.door import Door
from service.errors import Problem, answer_http_exception, answer_problem
from service.keys import Keys
from service.settings import Settings
from service.telemetry import Metrics, Telemetry

CALLS = {"/embed": routes.embed, "/cross-generate": routes.cross_generate, "/v1/embeddings": embeddings.embeddings}
"""What makes up the load, by path."""


def create(opened: Sequence[Runtime], settings: Settings, operators: socket.socket | None = None) -> FastAPI:
    """An app that serves opened bundles. They are warmed and checked in its lifespan, before the first request.

    Args:
        operators: where ``settings.admin_port`` is bound.

    Raises:
        KeysError: the file of API keys cannot be used.
        TracingError: OpenTelemetry is not installed.
        BundleError: the bundles' names are at odds.
    """
    keys = Keys(settings.api_keys_file, burst=settings.max_items) if settings.api_keys_file else None
    traced = tracing.to(settings.otel)
    build = {"version": version("concord"), "python": platform.python_version(), "onnxruntime": VERSION}
    metrics = Metrics(build)
    bundles = Bundles(opened, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as beside:
            await beside.enter_async_context(traced.exporting())
            if keys is not None:
                await beside.enter_async_context(keys.watched())
            if operators is not None:
                told = admin.create(app, settings, telemetry)
                await beside.enter_async_context(admin.running(told, settings, operators))
            await bundles.start()
            try:
                yield
            finally:
                await bundles.stop()

    routers = [routes.router, embeddings.router, models.router, probes.router]
    if settings.metrics and settings.admin_port is None:
        routers.append(probes.metrics_router)
    if settings.page:
        routers.append(site.router())
    paths = frozenset(str(route.path) for router in routers for route in router.routes if hasattr(route, "path"))
    telemetry = Middleware(
        Telemetry,
        metrics=metrics,
        model_version=lambda: bundles.choose(None).manifest.version,
        routes=paths,
        tracing=traced,
    )
    app = FastAPI(
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs and settings.admin_port is None else None,
        docs_url=None,  # their pages load scripts from other hosts
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours does that; FastAPI's would ask at every request
        middleware=[
            telemetry,
            Middleware(Access, keys=keys, hosts=settings.allowed_hosts, keyless=site.FILES if settings.page else ()),
            Middleware(BodyLimit, limit=settings.max_body_bytes, total=settings.max_bodies_bytes),
            Middleware(Direct, handlers=CALLS),
        ],
        exception_handlers={Problem: answer_problem, HTTPException: answer_http_exception},
    )
    app.state.bundles = bundles
    app.state.door = Door(bundles, metrics, traced)
    for router in routers:
        app.include_router(router)

    described: dict[tuple[Modality, ...], dict[str, Any]] = {}

    def document() -> dict[str, Any]:
        modalities = bundles.modalities()  # others when a bundle came since
        if modalities not in described:
            described.clear()
            described[modalities] = contract.document(app, modalities, settings, keys=bool(keys))
        return described[modalities]

    app.openapi = document  # type: ignore[method-assign]  # the way FastAPI documents
    return app
