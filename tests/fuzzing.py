"""What schemathesis must know to fuzz the service: pictures that are some, and the few answers that only look like failures.
``make fuzz`` runs it for 20 minutes, ``tests/test_contract_fuzz.py`` for half a minute."""

import base64
import io
import re
from typing import Any

import jsonschema_rs
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure

TIMEOUT = "X-Request-Timeout-Ms"
ENOUGH_MS = 10_000
NOT_IN_A_SCHEMA = {
    "bad_image": "that a string is a picture",
    "too_large": "its pixels",
    "nothing_to_generate": "that something is lacking, unless targets are named",
    "out_of_range": "the product of items, targets and samples",
}


def _file(colour: int, side: int, image_format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side + 1), (colour, 255 - colour, colour // 2)).save(file, image_format)
    return file.getvalue()


files = st.builds(_file, st.integers(0, 255), st.integers(1, 64), st.sampled_from(["PNG", "JPEG", "WEBP"]))
schemathesis.openapi.format("image", files.map(lambda content: base64.b64encode(content).decode()))
schemathesis.openapi.format("binary", files)
schemathesis.openapi.media_type("image/png, image/jpeg, image/webp", files)


def _is_right(case: Case) -> bool:
    """What breaks one branch of an anyOf may fit another, and an empty list in a form leaves nothing behind: a body that was
    made to be wrong is right now and then."""
    document = case.operation.schema.raw_schema
    content = document["paths"][case.path][case.method.lower()]["requestBody"]["content"]
    schema = {**content[case.media_type]["schema"], "components": document["components"]}
    body = case.body
    if case.media_type == "multipart/form-data" and isinstance(body, dict):
        body = {name: "file" if isinstance(part, bytes) else part for name, part in body.items() if part != []}
    return bool(jsonschema_rs.is_valid(schema, body))


def _is_overruled(message: str, case: Case) -> bool:
    """An option of the query that the body names too: the body's is the one that counts."""
    name = re.search(r"parameter `([^`.]+)[^`]*` in query", message)
    options = case.body.get("options", case.body) if isinstance(case.body, dict) else None
    return bool(name) and isinstance(options, dict) and name[1] in options


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    """Give the service the time to answer: schemathesis likes to ask for one millisecond."""
    asked = case.headers.get(TIMEOUT)
    if isinstance(asked, str | int) and str(asked).isdecimal() and 0 < int(asked) < ENOUGH_MS:
        case.headers[TIMEOUT] = str(ENOUGH_MS)


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:  # noqa: ARG001
    """False where the service is right."""
    body = response.json() if "json" in response.headers.get("content-type", [""])[0] else {}
    code = body.get("error", body).get("code") if isinstance(body, dict) else None
    name = type(failure).__name__
    if name == "AcceptedNegativeData":
        # With on_error partial, a bad item is told of in its place.
        told = isinstance(body, dict) and any("error" in item for item in body.get("data", ()))
        return not (told or ("in body" in failure.message and _is_right(case)) or _is_overruled(failure.message, case))
    return not (name == "RejectedPositiveData" and code in NOT_IN_A_SCHEMA)
