"""The operators' port: metrics, the OpenAPI document and the health checks, without a key and separate from the public port."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Sequence

import orjson
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from concord.service.errors import Problem, http_exception_handler, problem_handler
from concord.service.http.head import accept_head
from concord.service.http.server import configure
from concord.service.settings import Settings

POLL_SECONDS = 0.01


def create(served: FastAPI, settings: Settings, telemetry: Middleware, routers: Sequence[APIRouter]) -> FastAPI:
    """An app with these routers and the OpenAPI document of ``served``, whose state it shares."""
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        middleware=[telemetry],
        exception_handlers={Problem: problem_handler, HTTPException: http_exception_handler},
    )
    app.state = served.state
    for router in routers:
        app.include_router(router)
    accept_head(app, routers)
    if settings.docs:

        @app.get("/openapi.json")
        async def document(_: Request) -> Response:
            return Response(orjson.dumps(served.openapi()), media_type="application/json")

    return app


class _SecondServer(uvicorn.Server):
    """Runs in the event loop of the first server, which alone handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def running(app: FastAPI, settings: Settings, listener: socket.socket) -> AsyncIterator[None]:
    """Serves on ``listener`` inside this context."""
    server = _SecondServer(configure(app, settings))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not (server.started or task.done()):
            await asyncio.sleep(POLL_SECONDS)
        yield
    finally:
        server.should_exit = True
        await task
