"""The routes that run inference: the one table that the fast path, admission control and the OpenAPI document read."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request, Response
from pydantic import BaseModel

from concord.service.api import openai, routes
from concord.service.api.schemas import EmbeddingsOptions, EmbedOptions, GenerateOptions


@dataclass(frozen=True)
class Endpoint:
    """A POST route.

    Attributes:
        handler: raises ``Problem``.
        options: of its body.
    """

    handler: Callable[[Request], Awaitable[Response]]
    options: type[BaseModel]


ENDPOINTS = {
    "/embed": Endpoint(routes.embed, EmbedOptions),
    "/cross-generate": Endpoint(routes.cross_generate, GenerateOptions),
    "/v1/embeddings": Endpoint(openai.embeddings, EmbeddingsOptions),
}
"""By path."""
