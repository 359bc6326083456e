"""openapi/openapi.json is what the code says, and what it says is told completely."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from service.errors import CODES

COMMITTED = Path(__file__).parent.parent / "openapi" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(COMMITTED.read_bytes())
OPERATIONS = [(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations]


def test_the_committed_document_is_the_generated_one() -> None:
    command = [sys.executable, "-m", "service", "openapi"]
    generated = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert generated == COMMITTED.read_bytes(), "run: python -m service openapi > openapi/openapi.json"


def test_every_route_of_the_contract_is_there() -> None:
    promised = {
        "/embed",
        "/cross-generate",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/livez",
        "/readyz",
        "/healthz",
        "/metrics",
    }
    assert promised | {"/v2/health/live", "/v2/health/ready"} <= set(DOCUMENT["paths"])


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_error_is_a_problem_with_an_example(path: str, method: str) -> None:
    responses = DOCUMENT["paths"][path][method]["responses"]
    openai = path.startswith("/v1/")
    shape = "OpenAIErrorSchema" if openai else "ProblemSchema"
    schema = {"$ref": f"#/components/schemas/{shape}", "components": DOCUMENT["components"]}
    assert {"405", "500"} <= set(responses)
    for status, response in responses.items():
        for content in response.get("content", {}).values() if status >= "400" else ():
            if content["schema"] != {"$ref": "#/components/schemas/HealthAnswer"}:
                jsonschema.Draft202012Validator(schema).validate(content["example"])
                told = content["example"]["error"] if openai else content["example"]
                assert told.get("status", int(status)) == int(status)
                assert CODES[told["code"]][0] == int(status)


@pytest.mark.parametrize("path", ["/embed", "/cross-generate", "/v1/embeddings"])
def test_calls_tell_every_status_they_may_answer_with(path: str) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    failures = {"400", "401", "403", "404", "405", "413", "415", "422", "429", "500", "503", "504"}
    assert set(operation["responses"]) == {"200", *failures}
    forms = {"application/json"} | ({"multipart/form-data"} if path != "/v1/embeddings" else set())
    assert set(operation["requestBody"]["content"]) == forms


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_probes_alone_are_open_where_there_are_keys(path: str, method: str) -> None:
    probe = path.endswith("z") or path.startswith("/v2/health/")
    assert ("security" in DOCUMENT["paths"][path][method]) is not probe
