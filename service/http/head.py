"""HEAD requests: probes such as ``wget --spider`` send them."""

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute


def accept_head(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Give every GET route of these routers a HEAD route with the same response, whose body the server leaves out.

    FastAPI adds none. They are not part of the OpenAPI document.
    """
    for route in [route for router in routers for route in router.routes if isinstance(route, APIRoute)]:
        if "GET" in (route.methods or ()):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
