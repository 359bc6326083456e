"""Access control: the Host header, the API key and its quota, checked before the body is read."""

import asyncio
from collections.abc import Collection
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from concord.service.errors import Problem, respond
from concord.service.http.api_keys import ApiKey, ApiKeys
from concord.service.request_state import state_of

CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Authentication:
    """Passes on requests to open paths, and other requests that are allowed.

    The request's state then holds ``charge``, which takes items off the key's quota, and ``api_key``, its name for the log.

    Args:
        keys: None requires no key.
        hosts: names that the Host header may have, lower case, without port and brackets; empty allows any.
        open_paths: paths that need neither a key nor a certain host: health checks.
        keyless: paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        hosts: Collection[str],
        open_paths: Collection[str] = (),
        keyless: Collection[str] = (),
    ) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts
        self.open_paths = frozenset(open_paths)
        self.keyless = frozenset(keyless)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            try:
                key = self._authenticate(scope)
                if key is not None and scope["method"] == "POST":
                    await _check_quota(key)
            except Problem as problem:
                app = respond(scope, problem)
        await app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> ApiKey | None:
        """The key of the request. None: it needs none."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise Problem("bad_request", f"a request has one Host header, received {len(hosts)}")
        if self.hosts and (not hosts or _host(hosts[0]) not in self.hosts):
            raise Problem("bad_request", "the name in the Host header is not one of this server")
        if self.keys is None or scope["path"] in self.keyless:
            return None
        scheme, _, presented = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise Problem("missing_key", "an API key is needed: send Authorization: Bearer <key>", headers=CHALLENGE)
        key = self.keys.find(presented.strip().encode("latin-1"))
        if key is None:
            challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            raise Problem("wrong_key", "this API key is not known here", headers=challenge)
        state = state_of(scope)
        state.api_key = key.name
        state.charge = partial(_charge, key)
        return key


async def _check_quota(key: ApiKey) -> None:
    """Check that at least one item is left.

    Raises:
        Problem: 429, none is.
    """
    try:
        _charge(key, 0, blocking=False)
    except BlockingIOError:
        await asyncio.to_thread(_charge, key, 0)


def _charge(key: ApiKey, items: int, *, blocking: bool = True) -> None:
    """Take items off the key's quota.

    Raises:
        Problem: 429, fewer are left; for 0 items, not even one is left.
        BlockingIOError: another process uses the quota, and ``blocking`` is False.
    """
    if key.quota is None:
        return
    if wait := key.quota.take(items, blocking=blocking) if items else key.quota.wait_ms(1, blocking=blocking):
        detail = f"the quota of {key.name} is {key.quota.rate:g} items a second: wait {wait} ms"
        raise Problem("quota_exceeded", detail, retry_after_ms=wait)


def _host(header: str) -> str:
    """Without its port and the brackets of an IPv6 address."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()
