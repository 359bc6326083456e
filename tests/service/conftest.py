"""A real server on a loopback port, in a thread of the test process; every answer is held against the OpenAPI document."""

import base64
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image

from model import bundle
from model.runtime import Runtime
from service.app import create
from service.server import Server, bind
from service.settings import Settings
from tests.readme import ROOT


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin("digits"), threads=1)


@pytest.fixture(scope="session")
def serve(runtime: Runtime) -> Callable[..., contextlib.AbstractContextManager[httpx.Client]]:
    """``with serve(max_items=2) as client``: a server with these settings."""

    @contextlib.contextmanager
    def serve(*opened: Runtime, **settings: Any) -> Iterator[httpx.Client]:
        asked = Settings(**settings)
        operators = bind("127.0.0.1", asked.admin_port) if asked.admin_port is not None else None
        app = create(opened or [runtime], asked, operators)
        listener = bind("127.0.0.1", 0)
        server = Server(app, asked)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            host, port = listener.getsockname()
            document = app.openapi()
            hooks = {"response": [lambda response: hold_against(document, response)]}
            with httpx.Client(base_url=f"http://{host}:{port}", event_hooks=hooks, timeout=30, trust_env=False) as client:
                client.app = app  # type: ignore[attr-defined]
                client.operators = operators and operators.getsockname()[1]  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            thread.join()
            listener.close()

    return serve


@pytest.fixture(scope="session")
def client(serve: Callable[..., contextlib.AbstractContextManager[httpx.Client]]) -> Iterator[httpx.Client]:
    """A server with the default settings, the same for all tests."""
    with serve() as client:
        yield client


def hold_against(document: dict[str, Any], response: httpx.Response) -> None:
    """Fail unless the document promises this status, media type and body for the route; other routes answer with problems,
    and below /v1 with OpenAI's envelope."""
    response.read()
    media_type = response.headers["content-type"].partition(";")[0]
    path = response.request.url.path
    template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
    operation = document["paths"].get(template, {}).get(response.request.method.lower())
    if path == "/openapi.json":
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


def picture(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB", image_format: str = "PNG") -> bytes:
    """A file of noise."""
    channels = {"RGB": (3,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def values() -> dict[str, str]:
    """A value for each modality, as it stands in JSON."""
    pictures = {name: (ROOT / f"tests/fixtures/{name}-7.png").read_bytes() for name in ("digit", "photo")}
    return {**{name: base64.b64encode(picture).decode() for name, picture in pictures.items()}, "word": "seven"}
