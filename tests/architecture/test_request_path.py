"""How many files one request passes from its route to the queue: a reader has to follow them all."""

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
from fastapi import Request
from opentelemetry.trace import INVALID_SPAN

from concord.model import bundle
from concord.model.runtime import Runtime
from concord.service.api.endpoints import ENDPOINTS
from concord.service.app import create
from concord.service.inference.engine import Engine
from concord.service.request_state import RequestState, attach
from concord.service.settings import Settings
from tests.support.server import ROOT

MAX_FILES = 10


def files_to_the_queue(path: str, body: dict[str, Any]) -> list[str]:
    """Files of the packages in which a function runs, from the route's handler until the engine holds the jobs."""
    app = create([Runtime.load(bundle.builtin("digits"), threads=1)], Settings(threads=1))
    files: dict[str, None] = {}
    submit = Engine.submit.__code__
    queued = False

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal queued
        file = Path(frame.f_code.co_filename)
        if event == "call" and not queued and file.is_relative_to(ROOT) and ".venv" not in file.parts:
            parts = file.relative_to(ROOT).parts
            if parts[0] in ("service", "model"):
                files["/".join(parts)] = None
        queued = queued or frame.f_code is submit

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": orjson.dumps(body), "more_body": False}

    async def run() -> None:
        async with app.router.lifespan_context(app):
            scope: dict[str, Any] = {
                "type": "http",
                "method": "POST",
                "path": path,
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
                "app": app,
            }
            attach(scope, RequestState("1", INVALID_SPAN))
            request = Request(scope, receive)
            await ENDPOINTS[path].handler(request)  # once, so that what is made on first use is there
            sys.setprofile(profile)
            try:
                await ENDPOINTS[path].handler(Request(scope, receive))
            finally:
                sys.setprofile(None)

    asyncio.run(run())
    return list(files)


def test_request_passes_few_files_from_route_to_queue() -> None:
    files = files_to_the_queue("/embed", {"inputs": [{"word": "seven"}]})
    assert files[0] == "service/api/routes.py"
    assert files[-1] == "service/inference/engine.py"
    assert len(files) <= MAX_FILES, files
