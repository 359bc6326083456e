"""FastAPI without batching, as in its tutorial: one handler per request, and the model in a global variable.

The environment variable HANDLER chooses the handler of ``/embed``. ``thread`` and ``async`` respond with the embedding.
``noop`` reads the body and responds with as many bytes as Concord would.
"""

import os

import orjson
from fastapi import FastAPI, Request, Response

from tests.benchmarks.competitors.digits import DigitsEncoder

NOOP_BODY = b"0" * int(os.environ.get("RESPONSE_BYTES", "700"))

app = FastAPI()


def _response(body: bytes) -> Response:
    rows = [encoder.parse(item) for item in orjson.loads(body)["inputs"]]
    content = orjson.dumps({"embeddings": encoder.encode(rows)}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, media_type="application/json")


if os.environ.get("HANDLER") == "noop":

    @app.post("/embed")
    async def noop(request: Request) -> Response:
        await request.body()
        return Response(NOOP_BODY, media_type="application/json")

else:
    encoder = DigitsEncoder()

    if os.environ.get("HANDLER") == "async":

        @app.post("/embed")
        async def embed(request: Request) -> Response:
            return _response(await request.body())

    else:
        from typing import Annotated

        from fastapi import Depends

        async def content(request: Request) -> bytes:
            return await request.body()

        @app.post("/embed")
        def embed_in_thread(body: Annotated[bytes, Depends(content)]) -> Response:
            return _response(body)


@app.get("/ready")
async def ready() -> Response:
    return Response()
