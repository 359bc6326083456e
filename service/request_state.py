"""What is known of one request on its way through the service: typed, in one place of the ASGI scope."""

import asyncio
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from opentelemetry.trace import Span

KEY = "concord"


class ChargeQuota(Protocol):
    """Takes items off the key's quota.

    Raises:
        Problem: 429, too few are left.
        BlockingIOError: another process uses the quota, and ``blocking`` is False. Nothing was taken.
    """

    def __call__(self, items: int, *, blocking: bool = True) -> None: ...


def _no_quota(items: int, *, blocking: bool = True) -> None: ...


@dataclass(slots=True)
class RequestState:
    """Created by the outermost middleware, or by admission control for a request that it rejects."""

    request_id: str
    span: Span
    task: asyncio.Task[Any] | None = None
    """Cancelled by the connection when the client disconnects."""
    client_gone: bool = False
    alone: bool = False
    """The last requests came over the same connection: there is probably no other client."""
    api_key: str | None = None
    """Name of the key, for the log."""
    charge: ChargeQuota = _no_quota
    model_version: str | None = None
    error_code: str | None = None
    """One of ``errors.CODES`` if the request failed."""
    submitted_ns: int = 0
    """Wall clock when its jobs were submitted."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


def header(scope: Mapping[str, Any], name: bytes, default: str = "") -> str:
    """The request's first header of this name. Several times as fast as starlette's Headers.

    Args:
        name: in lower case.
    """
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), default)


def attach(scope: MutableMapping[str, Any], state: RequestState) -> None:
    """Make ``state`` that of the request with this scope."""
    scope.setdefault("state", {})[KEY] = state


def state_of(scope: Mapping[str, Any]) -> RequestState:
    """The state of the request with this scope."""
    return cast(RequestState, scope["state"][KEY])


def find_state(scope: Mapping[str, Any]) -> RequestState | None:
    """The same, or None before it is attached."""
    return cast("RequestState | None", scope.get("state", {}).get(KEY))
