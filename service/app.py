"""The ASGI application: routes, middleware, and the lifetime of the models."""

import contextlib
import platform
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from concord.model.modality import Modality
from concord.model.runtime import VERSION, Runtime
from concord.model.runtime.device import ErrorKind
from concord.service.api import health, models, openai, openapi, routes
from concord.service.api.endpoints import ENDPOINTS
from concord.service.api.health import HEALTH_PATHS, Health
from concord.service.api.parse_pool import ParsePool
from concord.service.api.rejections import CapacityCheck
from concord.service.api.requests import Parsers
from concord.service.errors import CODES, Problem, http_exception_handler, problem_handler
from concord.service.http import admin
from concord.service.http.admission import AdmissionControl
from concord.service.http.api_keys import ApiKeys
from concord.service.http.auth import Authentication
from concord.service.http.body_limit import BodyLimit
from concord.service.http.fast_path import FastPath
from concord.service.http.head import accept_head
from concord.service.http.shared_quotas import SharedLevels
from concord.service.inference.jobs import StopReason
from concord.service.inference.registry import ModelRegistry
from concord.service.inference.reload import Reloader
from concord.service.inference.served_model import ServedModel
from concord.service.page import routes as page_routes
from concord.service.settings import Settings
from concord.service.telemetry.metrics import Metrics
from concord.service.telemetry.middleware import Telemetry
from concord.service.telemetry.model_metrics import ModelCollector
from concord.service.telemetry.tracing import tracing_to
from concord.service.workers.channel import Handler
from concord.service.workers.link import SupervisorLink
from concord.service.workers.merged_metrics import Family, families


class Application(FastAPI):
    """FastAPI inside of the service's middleware. What the fast path serves passes none of FastAPI's.

    Args:
        outer: middleware, from the outermost on.
        options: of FastAPI.
    """

    def __init__(self, *, outer: Sequence[Middleware], **options: Any) -> None:
        super().__init__(**options)
        self._outer = outer

    def build_middleware_stack(self) -> ASGIApp:
        app = super().build_middleware_stack()
        for middleware, args, kwargs in reversed(self._outer):
            app = middleware(app, *args, **kwargs)
        return app


async def raise_again(_: Request, error: Exception) -> Response:
    """Leave an unexpected error to the telemetry middleware, instead of FastAPI's own response."""
    raise error


def create(
    opened: Sequence[Runtime],
    settings: Settings,
    operators: socket.socket | None = None,
    link: SupervisorLink | None = None,
    quotas: SharedLevels | None = None,
) -> FastAPI:
    """An app that serves opened bundles. They are warmed up and checked in its lifespan, before the first request.

    Args:
        operators: socket bound to ``settings.admin_port``.
        link: to the supervisor, if this is one of several workers.
        quotas: memory for the quotas of API keys, if this is one of several workers.

    Raises:
        ApiKeysError: the file of API keys cannot be used.
        TracingError: OpenTelemetry is not installed.
        BundleError: two bundles have the same name and version, or the default model is ambiguous.
    """
    keys = ApiKeys(settings.api_keys_file, settings.max_items, quotas) if settings.api_keys_file else None
    tracing = tracing_to(settings.otel)
    metrics = Metrics({"version": version("concord-mvae"), "python": platform.python_version(), "onnxruntime": VERSION})
    metrics.expect(ENDPOINTS, CODES, get_args(StopReason), get_args(ErrorKind))
    registry = ModelRegistry([serve(runtime, settings, metrics) for runtime in opened], settings.default_model)
    reloader = make_reloader(registry, settings, metrics, watch=link is None)
    health_state = Health(registry)
    parse_pool = ParsePool(settings.decode_threads)
    metrics.watch(lambda: sum(model.engine.queue_depth for model in registry.models), health_state.ready)
    metrics.registry.register(ModelCollector(reloader))

    def model_version() -> str:
        return registry.choose(None).manifest.version

    routers = [routes.router, openai.router, models.router, health.router]
    operators_routers = [health.router, *([health.metrics_router] if settings.metrics else [])]
    if settings.metrics and settings.admin_port is None:
        routers.append(health.metrics_router)
    if settings.page:
        routers.append(page_routes.router())
    paths = frozenset(str(route.path) for router in routers for route in router.routes if hasattr(route, "path"))
    telemetry = Middleware(Telemetry, metrics=metrics, model_version=model_version, routes=paths, tracing=tracing)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if link is not None:
                await stack.enter_async_context(link.opened(worker_handlers(health_state, reloader, metrics)))
            await stack.enter_async_context(tracing.exporting())
            if keys is not None:
                await stack.enter_async_context(keys.watched())
            if operators is not None:
                admin_app = admin.create(app, settings, telemetry, operators_routers)
                await stack.enter_async_context(admin.running(admin_app, settings, operators))
            try:
                await reloader.start()
                yield
            finally:
                await reloader.stop()
                parse_pool.stop()

    keyless = page_routes.FILES if settings.page else ()
    app = Application(
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs and settings.admin_port is None else None,
        docs_url=None,  # its pages load scripts from other hosts
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # the Telemetry middleware does all three
        outer=[
            telemetry,
            Middleware(Authentication, keys=keys, hosts=settings.allowed_hosts, open_paths=HEALTH_PATHS, keyless=keyless),
            Middleware(BodyLimit, limit=settings.max_body_bytes, total=settings.max_bodies_bytes),
            Middleware(FastPath, handlers={path: endpoint.handler for path, endpoint in ENDPOINTS.items()}),
        ],
        exception_handlers={Problem: problem_handler, HTTPException: http_exception_handler, Exception: raise_again},
    )
    capacity = CapacityCheck(registry, parse_pool, settings)
    services: dict[str, Any] = {
        "settings": settings,
        "metrics": metrics,
        "registry": registry,
        "reloader": reloader,
        "health": health_state,
        "link": link,
        "parse_pool": parse_pool,
        "parsers": Parsers(settings),
        "admission": AdmissionControl(ENDPOINTS, capacity, model_version, metrics, tracing),
    }
    for name, service in services.items():
        setattr(app.state, name, service)
    for router in routers:
        app.include_router(router)
    accept_head(app, routers)

    app.openapi = document_of(app, registry, settings, keys=bool(keys))  # type: ignore[method-assign]  # as FastAPI documents
    return app


def document_of(app: FastAPI, registry: ModelRegistry, settings: Settings, *, keys: bool) -> Callable[[], dict[str, Any]]:
    """Returns the OpenAPI document, which changes when a bundle is added."""
    documents: dict[tuple[Modality, ...], dict[str, Any]] = {}

    def document() -> dict[str, Any]:
        modalities = registry.modalities()
        if modalities not in documents:
            documents.clear()
            documents[modalities] = openapi.document(app, modalities, settings, keys=keys)
        return documents[modalities]

    return document


def serve(runtime: Runtime, settings: Settings, metrics: Metrics) -> ServedModel:
    """A model whose metrics start at 0."""
    metrics.expect_items([modality.name for modality in runtime.modalities])
    return ServedModel(runtime, settings, metrics)


def worker_handlers(health_state: Health, reloader: Reloader, metrics: Metrics) -> dict[str, Handler]:
    """What a worker does for its supervisor."""

    async def liveness() -> dict[str, str]:
        return health_state.liveness()

    async def readiness() -> dict[str, str]:
        return health_state.readiness()

    async def collect() -> list[Family]:
        return families(metrics.registry)

    async def prepare(folder: str) -> str | None:
        return await reloader.prepare(Path(folder))

    async def commit(folder: str) -> None:
        reloader.commit(Path(folder))

    async def abort(folder: str, reason: str) -> None:
        await reloader.abort(Path(folder), reason)

    handlers = (liveness, readiness, prepare, commit, abort)
    return {"families": collect, **{handler.__name__: handler for handler in handlers}}


def make_reloader(registry: ModelRegistry, settings: Settings, metrics: Metrics, *, watch: bool = True) -> Reloader:
    """Reloads the registry's bundles as the settings say. Without ``watch`` the supervisor does it."""

    def open_model(folder: Path) -> ServedModel:
        runtime = Runtime.load(folder, **settings.runtime_options())
        return serve(runtime, settings, metrics)

    return Reloader(
        registry,
        open_model,
        lambda: settings.bundle_folders() if settings.bundles else [],
        watch_seconds=settings.watch_seconds,
        retire_seconds=settings.request_timeout_ms / 1000,
        watch=watch,
    )
