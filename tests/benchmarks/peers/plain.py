"""FastAPI without batching, as its tutorial has it: a handler of a request, and the model a global.

``/embed`` answers with the embedding; ``/noop`` reads the same body and answers with as many bytes as the service would.
"""

import os

import orjson
from fastapi import FastAPI, Request, Response

from tests.benchmarks.peers.digits import Digits

ANSWER = b"0" * int(os.environ.get("ANSWER_BYTES", "700"))

app = FastAPI()


def _answer(body: bytes) -> Response:
    rows = [digits.decode(item) for item in orjson.loads(body)["inputs"]]
    answer = orjson.dumps({"embeddings": digits.encode(rows)}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(answer, media_type="application/json")


if os.environ.get("HANDLER") == "noop":

    @app.post("/embed")
    async def noop(request: Request) -> Response:
        await request.body()
        return Response(ANSWER, media_type="application/json")

else:
    digits = Digits()

    if os.environ.get("HANDLER") == "async":

        @app.post("/embed")
        async def embed(request: Request) -> Response:
            return _answer(await request.body())

    else:
        from typing import Annotated

        from fastapi import Depends

        async def content(request: Request) -> bytes:
            return await request.body()

        @app.post("/embed")
        def embed_in_thread(body: Annotated[bytes, Depends(content)]) -> Response:
            return _answer(body)


@app.get("/ready")
async def ready() -> Response:
    return Response()
