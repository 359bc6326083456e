"""What schemathesis needs to fuzz the service: valid images, and the responses that are right although they look like failures.

``make fuzz`` uses it for 20 minutes, tests/contract/test_contract_fuzz.py for half a minute.
"""

import re
from typing import Any

import jsonschema_rs
import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure
from schemathesis.transport.serialization import Binary

from tests.support.images import encode_image, to_base64

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
SHORTEST_TIMEOUT_MS = 10_000
NOT_IN_A_SCHEMA = {
    "bad_image": "that a string is an image",
    "too_large": "its number of pixels",
    "nothing_to_generate": "that a modality is absent, unless targets are named",
    "out_of_range": "the product of items, targets and samples",
    "no_gallery": "that the bundle has training examples for ``nearest``",
}
"""Codes of errors in a request that conforms to the document, with what no JSON schema can require."""


def _image_file(colour: int, side: int, image_format: str) -> bytes:
    image = Image.new("RGB", (side, side + 1), (colour, 255 - colour, colour // 2))
    return encode_image(image, image_format)


files = st.builds(_image_file, st.integers(0, 255), st.integers(1, 64), st.sampled_from(["PNG", "JPEG", "WEBP"]))
schemathesis.openapi.format("image", files.map(to_base64))
schemathesis.openapi.format("binary", files)
schemathesis.openapi.media_type("image/png, image/jpeg, image/webp", files)


def _conforms(case: Case) -> bool:
    """Return whether the body conforms to the document although schemathesis made it to violate it.

    What violates one branch of an anyOf may conform to another. In a form, an empty list leaves nothing, and a blank field is
    an absent modality.
    """
    document = case.operation.schema.raw_schema
    content = document["paths"][case.path][case.method.lower()]["requestBody"]["content"]
    schema = {**content[case.media_type]["schema"], "components": document["components"]}
    body = case.body
    if case.media_type == "multipart/form-data" and isinstance(body, dict):
        parts = {name: "file" if isinstance(part, bytes | Binary) else part for name, part in body.items() if part != []}
        body = {name: part for name, part in parts.items() if not (isinstance(part, str) and not part.strip())}
    return bool(jsonschema_rs.is_valid(schema, body))


def _is_replaced(message: str, case: Case) -> bool:
    """Return whether the invalid query option is also in the body, which takes precedence."""
    name = re.search(r"parameter `([^`.]+)[^`]*` in query", message)
    options = case.body.get("options", case.body) if isinstance(case.body, dict) else None
    return bool(name) and isinstance(options, dict) and name[1] in options


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    """Give the service time to respond: schemathesis prefers deadlines of one millisecond."""
    timeout = case.headers.get(TIMEOUT_HEADER)
    if isinstance(timeout, str | int) and str(timeout).isdecimal() and 0 < int(timeout) < SHORTEST_TIMEOUT_MS:
        case.headers[TIMEOUT_HEADER] = str(SHORTEST_TIMEOUT_MS)


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:  # noqa: ARG001
    """Return False for a failure where the service is right."""
    body = response.json() if "json" in response.headers.get("content-type", [""])[0] else {}
    code = body.get("error", body).get("code") if isinstance(body, dict) else None
    name = type(failure).__name__
    if name == "AcceptedNegativeData":
        # With on_error=partial, the error of an item is in the data of a response with status 200.
        partial = isinstance(body, dict) and any("error" in item for item in body.get("data", ()))
        return not (partial or ("in body" in failure.message and _conforms(case)) or _is_replaced(failure.message, case))
    return not (name == "RejectedPositiveData" and code in NOT_IN_A_SCHEMA)
