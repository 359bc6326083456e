"""The client for Python. ``from concord.client import Client``; needs httpx and NumPy alone."""

from concord.client.client import AsyncClient, Client
from concord.client.responses import (
    AccessError,
    DeadlineError,
    Embedding,
    Embeddings,
    Failure,
    Fault,
    Generation,
    InvalidRequestError,
    Model,
    Refinement,
    Response,
    ServiceError,
    Sound,
    TrainingExample,
    UnavailableError,
)

__all__ = [
    "AccessError",
    "AsyncClient",
    "Client",
    "DeadlineError",
    "Embedding",
    "Embeddings",
    "Failure",
    "Fault",
    "Generation",
    "InvalidRequestError",
    "Model",
    "Refinement",
    "Response",
    "ServiceError",
    "Sound",
    "TrainingExample",
    "UnavailableError",
]
