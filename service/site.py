"""The page in the browser: files of the package, and what it shows of a bundle. No route here is part of the API."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from model.bundle import BundleError
from service.bundles import Bundles
from service.errors import Problem
from service.samples import describe

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
RETRY_AFTER_MS = 5000
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILES = {"/" if file.name == INDEX else f"/page/{file.name}": file for file in FOLDER.iterdir() if file.suffix in MEDIA_TYPES}
"""By path. Whoever may reach the service may load them without a key: they hold nothing of the bundle."""

Endpoint = Callable[[Request], Awaitable[Response]]


def router() -> APIRouter:
    """Routes of the page, its files read into memory. None of them is in the OpenAPI document."""
    routes = APIRouter(include_in_schema=False)
    for path, file in FILES.items():
        routes.add_route(path, _file(file), methods=["GET"], include_in_schema=False)
    described: dict[str, bytes] = {}

    async def samples(request: Request) -> Response:
        """Inputs to start from, and a map of the latent space. ``model`` is a name, or name@version."""
        bundles: Bundles = request.app.state.bundles
        bundle = bundles.choose(request.path_params["model"]).runtime.bundle
        if bundle.sha256 not in described:
            try:
                content = await bundles.decoding.in_thread(describe, bundle)
            except BundleError as error:
                detail = "the bundle's files changed since it was loaded"
                raise Problem("not_ready", detail, retry_after_ms=RETRY_AFTER_MS) from error
            for gone in described.keys() - {serving.runtime.bundle.sha256 for serving in bundles.all()}:
                del described[gone]
            described[bundle.sha256] = content
        return Response(described[bundle.sha256], media_type="application/json", headers={"Cache-Control": "no-cache"})

    routes.add_route("/page/samples/{model}", samples, methods=["GET"], include_in_schema=False)
    return routes


def _file(file: Path) -> Endpoint:
    content = file.read_bytes()
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}
    media_type = MEDIA_TYPES[file.suffix]

    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer
