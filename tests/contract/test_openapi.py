"""openapi/openapi.json is the generated document, and describes every route and error."""

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest

from concord.service.errors import CODES
from tests.support.server import ROOT

COMMITTED = ROOT / "openapi" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(COMMITTED.read_bytes())
OPERATIONS = [(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations]


def test_committed_document_is_the_generated_one() -> None:
    command = [sys.executable, "-m", "concord.service", "openapi"]
    generated = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert generated == COMMITTED.read_bytes(), "run: concord openapi > openapi/openapi.json"


def test_document_has_every_public_route() -> None:
    routes = {
        "/embed",
        "/cross-generate",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/livez",
        "/readyz",
        "/healthz",
        "/metrics",
        "/v2/health/live",
        "/v2/health/ready",
    }
    assert routes <= set(DOCUMENT["paths"])


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_errors_are_problem_objects_with_a_valid_example(path: str, method: str) -> None:
    responses = DOCUMENT["paths"][path][method]["responses"]
    openai = path.startswith("/v1/")
    shape = "OpenAIErrorSchema" if openai else "ProblemSchema"
    schema = {"$ref": f"#/components/schemas/{shape}", "components": DOCUMENT["components"]}
    assert {"405", "500"} <= set(responses)
    for status, response in responses.items():
        for content in response.get("content", {}).values() if status >= "400" else ():
            if content["schema"] != {"$ref": "#/components/schemas/HealthAnswer"}:
                jsonschema.Draft202012Validator(schema).validate(content["example"])
                error = content["example"]["error"] if openai else content["example"]
                assert error.get("status", int(status)) == int(status)
                assert CODES[error["code"]][0] == int(status)


@pytest.mark.parametrize("path", ["/embed", "/cross-generate", "/v1/embeddings"])
def test_inference_routes_list_every_status(path: str) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    failures = {"400", "401", "403", "404", "405", "413", "415", "422", "429", "500", "503", "504"}
    assert set(operation["responses"]) == {"200", *failures}
    forms = {"application/json"} | ({"multipart/form-data"} if path != "/v1/embeddings" else set())
    assert set(operation["requestBody"]["content"]) == forms


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_route_but_the_health_checks_lists_the_key(path: str, method: str) -> None:
    is_health_check = path.endswith("z") or path.startswith("/v2/health/")
    assert ("security" in DOCUMENT["paths"][path][method]) is not is_health_check
