"""The OpenAPI document: what FastAPI knows of the routes, and what only the bundle knows, which is what an input looks like."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from model.codec import MEDIA_TYPES
from model.modality import ImageModality, Modality, TextModality
from service import values
from service.calls import MAX_ID_CHARACTERS
from service.errors import CODES, MEDIA_TYPE, OPENAI_PREFIX, Fault, OpenAIErrorSchema, Problem, ProblemSchema
from service.probes import OPEN
from service.routes import TIMEOUT_HEADER
from service.schemas import CallOptions, EmbeddingsOptions, EmbedOptions, GenerateOptions
from service.settings import Settings

_CALLS: dict[str, type[CallOptions]] = {"/embed": EmbedOptions, "/cross-generate": GenerateOptions}
_EMBEDDINGS = "/v1/embeddings"
_STATUSES: tuple[int, ...] = (405, 413, 500)
_GUARDED_STATUSES: tuple[int, ...] = (*_STATUSES, 400, 401, 403)
_CALL_STATUSES: tuple[int, ...] = (*_GUARDED_STATUSES, 404, 415, 422, 429, 503, 504)
_REF = "#/components/schemas/{model}"


def document(app: FastAPI, modalities: tuple[Modality, ...], settings: Settings, keys: bool = False) -> dict[str, Any]:
    """The document of an app that serves a bundle of these modalities.

    Args:
        settings: its limits are told.
        keys: an API key is asked for.
    """
    described = get_openapi(
        title="Concord",
        version=version("concord"),
        summary="One embedding from whatever modalities are there, and the missing ones generated from it.",
        routes=app.routes,
    )
    schemas: dict[str, Any] = described["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which this service never answers with
        schemas.pop(name, None)
    for error in (ProblemSchema, OpenAIErrorSchema):
        schema = error.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs"))
        schemas[error.__name__] = schema
    schemas["Input"] = values.item(modalities)
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}}
    for path, operations in described["paths"].items():
        for operation in operations.values():
            statuses = _STATUSES if path in OPEN else _GUARDED_STATUSES
            if path in _CALLS or path == _EMBEDDINGS:
                statuses = _CALL_STATUSES
            elif "{" in path:
                statuses = (*_GUARDED_STATUSES, 404)
            operation["responses"].pop("422", None)
            for status in sorted(statuses):
                operation["responses"].setdefault(str(status), _problem(status, path))
            if path not in OPEN:
                operation["security"] = [{"key": []}] if keys else [{}, {"key": []}]
            if path in _CALLS:
                _describe_call(operation, schemas, modalities, _CALLS[path], settings)
            elif path == _EMBEDDINGS:
                _describe_embeddings(operation, schemas, modalities, settings)
            if statuses is _CALL_STATUSES:
                _describe_headers(operation)
    return described


def _describe_call(
    operation: dict[str, Any],
    schemas: dict[str, Any],
    modalities: tuple[Modality, ...],
    options: type[CallOptions],
    settings: Settings,
) -> None:
    body = options.model_json_schema(ref_template=_REF)
    schemas.update(body.pop("$defs"))
    schemas["RefineOptions"]["properties"]["steps"]["maximum"] = settings.max_refine_steps
    if options is GenerateOptions:
        body["properties"]["num_samples"]["maximum"] = settings.max_samples
        names = {"enum": [m.name for m in modalities]}
        body["properties"]["targets"]["anyOf"][0].update(items=names, uniqueItems=True, maxItems=len(modalities))
    name = options.__name__
    schemas[name] = {**body, "properties": dict(body["properties"])}
    items = {"type": "array", "items": {"$ref": "#/components/schemas/Input"}, "minItems": 1, "maxItems": settings.max_items}
    request = name.replace("Options", "Request")
    schemas[request] = {**body, "title": request, "properties": {"inputs": items, **body["properties"]}, "required": ["inputs"]}
    sample = {"inputs": [{"id": "first", **{m.name: values.example(m) for m in modalities[-1:]}}]}
    all_but_one = {"inputs": [{m.name: values.example(m) for m in modalities[1:]}], "seed": 7, "refine": {"steps": 2}}
    parts: dict[str, Any] = {m.name: values.part(m) for m in modalities}
    parts["id"] = {"type": "string", "maxLength": MAX_ID_CHARACTERS}
    parts["options"] = {"$ref": f"#/components/schemas/{name}"}
    media = {m.name: {"contentType": ", ".join(MEDIA_TYPES)} for m in modalities if isinstance(m, ImageModality) and m.in_files}
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{request}"},
                "examples": {
                    "one": {"summary": "One modality", "value": sample},
                    "refined": {"summary": "A refined subset", "value": all_but_one},
                },
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": parts,
                    "anyOf": [{"required": [m.name]} for m in modalities],
                    "additionalProperties": False,
                },
                "encoding": {**media, "options": {"contentType": "application/json"}},
            },
        },
    }
    operation["parameters"] = [
        {
            "name": option,
            "in": "query",
            "required": False,
            "description": "As in the body, which overrules it.",
            "schema": schema,
        }
        for option, schema in _query_options(body["properties"], schemas)
    ]


def _describe_embeddings(
    operation: dict[str, Any], schemas: dict[str, Any], modalities: tuple[Modality, ...], settings: Settings
) -> None:
    body = EmbeddingsOptions.model_json_schema(ref_template=_REF)
    several = {"minItems": 1, "maxItems": settings.max_items}
    item: dict[str, Any] = {"$ref": "#/components/schemas/Input"}
    texts = [m for m in modalities if isinstance(m, TextModality)]
    forms = [{"type": "array", "items": item, **several}]
    if len(texts) == 1:
        text = values.forms(texts[0])[0]
        forms = [text, {"type": "array", "items": {"anyOf": [text, item]}, **several}]
    schemas["EmbeddingsRequest"] = {
        **body,
        "title": "EmbeddingsRequest",
        "properties": {"input": {"anyOf": forms}, **body["properties"]},
        "required": ["input"],
    }
    example = {
        "input": [values.example(texts[0])] if len(texts) == 1 else [{modalities[-1].name: values.example(modalities[-1])}]
    }
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/EmbeddingsRequest"},
                "examples": {"one": {"summary": "One modality", "value": example}},
            }
        },
    }


def _describe_headers(operation: dict[str, Any]) -> None:
    operation["parameters"] = [
        *operation.get("parameters", ()),
        {
            "name": "X-Request-Timeout-Ms",
            "in": "header",
            "required": False,
            "description": "Answer 504 after this time; the server caps it.",
            "schema": {"type": "integer", "minimum": 1},
        },
        {
            "name": "X-Request-Id",
            "in": "header",
            "required": False,
            "description": "Echoed where it has 1 to 128 letters, digits, dots, dashes and _; else a new one is made.",
            "schema": {"type": "string"},
        },
    ]
    text = {"schema": {"type": "string"}}
    operation["responses"]["200"]["headers"] = {
        "X-Request-Id": text,
        "X-Model-Version": text,
        "Server-Timing": {"description": "Milliseconds of queue, decode, encode, refine, generate.", **text},
    }
    for status in ("429", "503"):
        unit = {"Retry-After": "Seconds.", "Retry-After-Ms": "Milliseconds."}
        operation["responses"][status]["headers"] = {
            name: {"description": told, "schema": {"type": "integer"}} for name, told in unit.items()
        }
    assert TIMEOUT_HEADER == "x-request-timeout-ms"


def _query_options(properties: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, Any]]:
    """The options, those within an object by their dotted names."""
    flat: list[tuple[str, Any]] = []
    for name, schema in properties.items():
        if "$ref" in schema:
            inner = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
            flat += [(f"{name}.{key}", value) for key, value in inner.items()]
        else:
            flat.append((name, schema))
    return flat


def _problem(status: int, path: str) -> dict[str, Any]:
    codes = [code for code, (its, _) in CODES.items() if its == status]
    retry = 120 if status in (429, 503) else None
    faults = (Fault("/inputs/0", codes[-1], "what was received and what is allowed"),) if status == 422 else ()
    example = Problem(codes[-1], "what was received and what is allowed", faults=faults, retry_after_ms=retry)
    told = f"{CODES[codes[-1]][1]}. Codes: {', '.join(codes)}."
    if path.startswith(OPENAI_PREFIX):
        content = {"schema": {"$ref": "#/components/schemas/OpenAIErrorSchema"}, "example": example.envelope()}
        return {"description": told, "content": {"application/json": content}}
    content = {"schema": {"$ref": "#/components/schemas/ProblemSchema"}, "example": example.body("01JABCDEF")}
    return {"description": told, "content": {MEDIA_TYPE: content}}
