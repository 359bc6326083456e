"""Routes of the browser page: its static files, and the demo data of a bundle. They are not part of the API."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from concord.model.bundle import BundleError
from concord.service.api.requests import choose
from concord.service.errors import Problem
from concord.service.inference.registry import ModelRegistry
from concord.service.page.demo_data import describe

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
RETRY_AFTER_MS = 5000
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "media-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILES = {"/" if file.name == INDEX else f"/page/{file.name}": file for file in FOLDER.iterdir() if file.suffix in MEDIA_TYPES}
"""Static files by URL path. They need no API key, because they contain no data of the bundle."""

Endpoint = Callable[[Request], Awaitable[Response]]


def router() -> APIRouter:
    """Returns the routes of the page, which the OpenAPI document leaves out. Reads the static files into memory."""
    routes = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        routes.add_route(path, _file(file), methods=["GET"], include_in_schema=False)
    cached: dict[str, bytes] = {}

    async def demo_data(request: Request) -> Response:
        """The response of ``describe`` for the model of the path: a name, or name@version."""
        registry: ModelRegistry = request.app.state.registry
        bundle = choose(registry, request.path_params["model"]).runtime.bundle
        if bundle.sha256 not in cached:
            try:
                content = await request.app.state.parse_pool.in_thread(describe, bundle)
            except BundleError as error:
                detail = "the bundle's files changed since it was loaded"
                raise Problem("not_ready", detail, retry_after_ms=RETRY_AFTER_MS) from error
            for unserved in cached.keys() - {model.runtime.bundle.sha256 for model in registry.models}:
                del cached[unserved]
            cached[bundle.sha256] = content
        return Response(cached[bundle.sha256], media_type="application/json", headers={"Cache-Control": "no-cache"})

    routes.add_route("/page/samples/{model}", demo_data, methods=["GET"], include_in_schema=False)
    return routes


def _file(file: Path) -> Endpoint:
    """Returns an endpoint that responds with the file, or with 304 if the client's copy is current."""
    content = file.read_bytes()
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}
    media_type = MEDIA_TYPES[file.suffix]

    async def respond(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return respond
