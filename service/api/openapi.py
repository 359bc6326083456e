"""The OpenAPI document: the routes from FastAPI, and the schema of an input from the bundle."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from concord.model.codec import media_types
from concord.model.modality import Modality, is_text
from concord.service.api import json_schema
from concord.service.api.endpoints import ENDPOINTS
from concord.service.api.health import HEALTH_PATHS
from concord.service.api.requests import MAX_ID_CHARACTERS
from concord.service.api.routes import TIMEOUT_HEADER
from concord.service.api.schemas import CallOptions, EmbeddingsOptions, GenerateOptions
from concord.service.errors import CODES, MEDIA_TYPE, OPENAI_PREFIX, Fault, OpenAIErrorSchema, Problem, ProblemSchema
from concord.service.settings import Settings

_STATUSES: tuple[int, ...] = (405, 413, 500)
_GUARDED_STATUSES: tuple[int, ...] = (*_STATUSES, 400, 401, 403)
_INFERENCE_STATUSES: tuple[int, ...] = (*_GUARDED_STATUSES, 404, 415, 422, 429, 503, 504)
_REF = "#/components/schemas/{model}"


def document(app: FastAPI, modalities: tuple[Modality, ...], settings: Settings, keys: bool = False) -> dict[str, Any]:
    """The document of an app that serves a bundle of these modalities.

    Args:
        settings: its limits are part of the document.
        keys: an API key is required.
    """
    openapi = get_openapi(
        title="Concord",
        version=version("concord-mvae"),
        summary="One embedding from any subset of modalities, and the missing ones generated from it.",
        routes=app.routes,
    )
    schemas: dict[str, Any] = openapi["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which this service never returns
        schemas.pop(name, None)
    for error in (ProblemSchema, OpenAIErrorSchema):
        schema = error.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs"))
        schemas[error.__name__] = schema
    schemas["Input"] = json_schema.item(modalities)
    openapi["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key."}}
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            statuses = _STATUSES if path in HEALTH_PATHS else _GUARDED_STATUSES
            endpoint = ENDPOINTS.get(path)
            if endpoint is not None:
                statuses = _INFERENCE_STATUSES
            elif "{" in path:
                statuses = (*_GUARDED_STATUSES, 404)
            operation["responses"].pop("422", None)
            for status in sorted(statuses):
                operation["responses"].setdefault(str(status), _problem(status, path))
            if path not in HEALTH_PATHS:
                operation["security"] = [{"key": []}] if keys else [{}, {"key": []}]
            if endpoint is not None:
                if issubclass(endpoint.options, CallOptions):
                    _describe_call(operation, schemas, modalities, endpoint.options, settings)
                else:
                    _describe_embeddings(operation, schemas, modalities, settings)
                _describe_headers(operation)
    return openapi


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
        for option in ("num_samples", "nearest"):
            body["properties"][option]["maximum"] = settings.max_samples
        names = {"enum": [m.name for m in modalities]}
        body["properties"]["targets"]["anyOf"][0].update(items=names, uniqueItems=True, maxItems=len(modalities))
    query = _query_options(body["properties"], schemas)
    nested = [schemas["OutputOptions"], schemas["TextOptions"]] if options is GenerateOptions else []
    for component in (body, schemas["RefineOptions"], *nested):
        component["properties"] = _or_null(component["properties"])
    name = options.__name__
    schemas[name] = {**body, "properties": dict(body["properties"])}
    item = {"$ref": "#/components/schemas/Input"}
    items = {"anyOf": [{"type": "array", "items": item, "minItems": 1, "maxItems": settings.max_items}, item]}
    request = name.replace("Options", "Request")
    schemas[request] = {**body, "title": request, "properties": {"inputs": items, **body["properties"]}, "required": ["inputs"]}
    sample = {"inputs": [{"id": "first", **{m.name: json_schema.example(m) for m in modalities[-1:]}}]}
    all_but_one = {"inputs": [{m.name: json_schema.example(m) for m in modalities[1:]}], "seed": 7, "refine": {"steps": 2}}
    parts: dict[str, Any] = {m.name: json_schema.part(m) for m in modalities}
    parts["id"] = {"type": "string", "maxLength": MAX_ID_CHARACTERS}
    parts["options"] = {"$ref": f"#/components/schemas/{name}"}
    media = {m.name: {"contentType": ", ".join(accepted)} for m in modalities if (accepted := media_types(m))}
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
            "description": "As in the body, which takes precedence.",
            "schema": schema,
        }
        for option, schema in query
    ]


def _describe_embeddings(
    operation: dict[str, Any], schemas: dict[str, Any], modalities: tuple[Modality, ...], settings: Settings
) -> None:
    body = EmbeddingsOptions.model_json_schema(ref_template=_REF)
    body["properties"] = _or_null(body["properties"])
    several = {"minItems": 1, "maxItems": settings.max_items}
    item: dict[str, Any] = {"$ref": "#/components/schemas/Input"}
    texts = [m for m in modalities if is_text(m)]
    forms = [item, {"type": "array", "items": item, **several}]
    if len(texts) == 1:
        text = json_schema.forms(texts[0])[0]
        texts_only = {"type": "array", "items": text, "minItems": 1, "maxItems": max(settings.max_texts, settings.max_items)}
        forms = [text, item, texts_only, {"type": "array", "items": {"anyOf": [text, item]}, **several}]
    schemas["EmbeddingsRequest"] = {
        **body,
        "title": "EmbeddingsRequest",
        "properties": {"input": {"anyOf": forms}, **body["properties"]},
        "required": ["input"],
    }
    last = modalities[-1]
    value = json_schema.example(texts[0]) if len(texts) == 1 else {last.name: json_schema.example(last)}
    example = {"input": [value]}
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
            "description": "Respond with 504 after this time; capped by the server.",
            "schema": {"type": "integer", "minimum": 1},
        },
        {
            "name": "X-Request-Id",
            "in": "header",
            "required": False,
            "description": "Echoed if it has 1 to 128 letters, digits, dots, dashes and _; otherwise a new one is made.",
            "schema": {"type": "string"},
        },
    ]
    text = {"schema": {"type": "string"}}
    operation["responses"]["200"]["headers"] = {
        "X-Request-Id": text,
        "X-Model-Version": text,
        "Server-Timing": {"description": "Milliseconds of queue, decode, features, encode, refine, generate.", **text},
    }
    for status in ("429", "503"):
        units = {"Retry-After": "Seconds.", "Retry-After-Ms": "Milliseconds."}
        operation["responses"][status]["headers"] = {
            name: {"description": meaning, "schema": {"type": "integer"}} for name, meaning in units.items()
        }
    assert TIMEOUT_HEADER == b"x-request-timeout-ms"


def _query_options(properties: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, Any]]:
    """The options; those of an inner object by their dotted names."""
    flat: list[tuple[str, Any]] = []
    for name, schema in properties.items():
        if "$ref" in schema:
            inner = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
            flat += [(f"{name}.{key}", value) for key, value in inner.items()]
        else:
            flat.append((name, schema))
    return flat


def _or_null(properties: dict[str, Any]) -> dict[str, Any]:
    """Schemas of options, of which null is the same as left out."""
    nullable = {}
    for name, schema in properties.items():
        if {"type": "null"} in schema.get("anyOf", ()):
            nullable[name] = schema
            continue
        about = {key: schema[key] for key in ("default", "description", "title") if key in schema}
        values = {key: value for key, value in schema.items() if key not in about}
        nullable[name] = {"anyOf": [values, {"type": "null"}], **about}
    return nullable


def _problem(status: int, path: str) -> dict[str, Any]:
    codes = [code for code, (its, _) in CODES.items() if its == status]
    retry = 120 if status in (429, 503) else None
    faults = (Fault("/inputs/0", codes[-1], "what was received and what is allowed"),) if status == 422 else ()
    example = Problem(codes[-1], "what was received and what is allowed", faults=faults, retry_after_ms=retry)
    description = f"{CODES[codes[-1]][1]}. Codes: {', '.join(codes)}."
    if path.startswith(OPENAI_PREFIX):
        content = {"schema": {"$ref": "#/components/schemas/OpenAIErrorSchema"}, "example": example.envelope()}
        return {"description": description, "content": {"application/json": content}}
    content = {"schema": {"$ref": "#/components/schemas/ProblemSchema"}, "example": example.body("01JABCDEF")}
    return {"description": description, "content": {MEDIA_TYPE: content}}
