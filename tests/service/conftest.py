"""A real server on a loopback port, in a thread of the test process. Responses are validated against the OpenAPI document."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from concord.model import bundle
from concord.model.runtime import Runtime
from concord.service.app import create
from concord.service.http.server import Server, bind
from concord.service.http.shared_quotas import SharedLevels
from concord.service.settings import Settings
from tests.support.images import to_base64
from tests.support.server import ROOT


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin("digits"), threads=1)


@pytest.fixture(scope="session")
def serve(runtime: Runtime) -> Callable[..., contextlib.AbstractContextManager[httpx.Client]]:
    """``with serve(max_items=2) as client``: a server with these settings, for the given runtimes or the built-in one."""

    @contextlib.contextmanager
    def serve(*runtimes: Runtime, quotas: SharedLevels | None = None, **options: Any) -> Iterator[httpx.Client]:
        settings = Settings(**options)
        admin_listener = bind("127.0.0.1", settings.admin_port) if settings.admin_port is not None else None
        app = create(runtimes or [runtime], settings, admin_listener, quotas=quotas)
        listener = bind("127.0.0.1", 0)
        server = Server(app, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            host, port = listener.getsockname()
            document = app.openapi()
            hooks = {"response": [lambda response: validate_response(document, response)]}
            with httpx.Client(base_url=f"http://{host}:{port}", event_hooks=hooks, timeout=60, trust_env=False) as client:
                client.app = app  # type: ignore[attr-defined]
                client.admin_port = admin_listener and admin_listener.getsockname()[1]  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            thread.join()
            listener.close()

    return serve


@pytest.fixture(scope="session")
def client(serve: Callable[..., contextlib.AbstractContextManager[httpx.Client]]) -> Iterator[httpx.Client]:
    """A server with the default settings, shared by all tests."""
    with serve() as client:
        yield client


def validate_response(document: dict[str, Any], response: httpx.Response) -> None:
    """Fail unless the document allows this status, media type and body for the route.

    Other routes must respond with a problem object, and below /v1 with OpenAI's envelope.
    """
    response.read()
    media_type = response.headers["content-type"].partition(";")[0]
    path = response.request.url.path
    template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
    operation = document["paths"].get(template, {}).get(response.request.method.lower())
    if path == "/openapi.json" or response.request.method == "HEAD":
        return
    if operation is None:
        assert response.status_code in {400, 401, 403, 404, 405, 413}
        openai = path.startswith("/v1/")
        schema = {"$ref": f"#/components/schemas/{'OpenAIErrorSchema' if openai else 'ProblemSchema'}"}
        assert media_type == ("application/json" if openai else "application/problem+json")
    else:
        schema = operation["responses"][str(response.status_code)]["content"][media_type]["schema"]
    if media_type.endswith("json"):
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())


@pytest.fixture(scope="session")
def values() -> dict[str, str]:
    """A value for each modality of the built-in bundle, in its JSON form."""
    images = {name: to_base64((ROOT / f"tests/fixtures/{name}-7.png").read_bytes()) for name in ("digit", "photo")}
    return {**images, "word": "seven"}
