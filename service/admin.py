"""The operator's port: metrics, the OpenAPI document and the probes, apart from where callers come in and without a key."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from service import probes
from service.errors import Problem, answer_http_exception, answer_problem
from service.server import configure
from service.settings import Settings

POLL_SECONDS = 0.01


def create(served: FastAPI, settings: Settings, telemetry: Middleware) -> FastAPI:
    """An app that tells of ``served``, which it shares the state with."""
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        middleware=[telemetry],
        exception_handlers={Problem: answer_problem, HTTPException: answer_http_exception},
    )
    app.state = served.state
    app.include_router(probes.router)
    if settings.metrics:
        app.include_router(probes.metrics_router)
    if settings.docs:

        @app.get("/openapi.json")
        async def document(_: Request) -> Response:
            return Response(orjson.dumps(served.openapi()), media_type="application/json")

    return app


class _Beside(uvicorn.Server):
    """A second server in the loop of the first, which alone hears signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def running(app: FastAPI, settings: Settings, listener: socket.socket) -> AsyncIterator[None]:
    """Answers at ``listener`` while this lasts."""
    server = _Beside(configure(app, settings))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not (server.started or task.done()):
            await asyncio.sleep(POLL_SECONDS)
        yield
    finally:
        server.should_exit = True
        await task
