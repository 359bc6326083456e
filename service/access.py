"""Who may ask: the Host header, the API key and its quota, checked before anything of the body is read."""

from collections.abc import Collection
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem, respond
from service.keys import Key, Keys
from service.probes import OPEN

CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Access:
    """Lets probes through, and other requests that may pass.

    The state of the scope then holds ``charge``, which takes items off the key's quota, and ``key``, its name for the log.

    Args:
        keys: None asks for no key.
        hosts: names that the Host header may have, lower case and without a port; empty allows any.
        keyless: paths for which no key is asked.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, hosts: Collection[str], keyless: Collection[str] = ()) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts
        self.keyless = frozenset(keyless)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            scope["state"]["charge"] = partial(_charge, None)
            if scope["path"] not in OPEN:
                try:
                    self._admit(scope)
                except Problem as problem:
                    app = respond(scope, problem)
        await app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        named = headers.getlist("host")
        if len(named) > 1 or (not named and scope["http_version"] == "1.1"):
            raise Problem("bad_request", f"a request has one Host header, received {len(named)}")
        if self.hosts and (not named or _host(named[0]) not in self.hosts):
            raise Problem("bad_request", "this server does not answer to the name in the Host header")
        if self.keys is None or scope["path"] in self.keyless:
            return
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise Problem("missing_key", "an API key is needed: send Authorization: Bearer <key>", headers=CHALLENGE)
        key = self.keys.find(presented.strip().encode("latin-1"))
        if key is None:
            told = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            raise Problem("wrong_key", "this API key is not known here", headers=told)
        scope["state"]["key"] = key.name
        scope["state"]["charge"] = partial(_charge, key)
        if scope["method"] == "POST":
            _charge(key, 0)


def _charge(key: Key | None, items: int) -> None:
    """Take items off the key's quota. Raises Problem, 429, where not so many are left: for 0, not even one."""
    if key is None or key.quota is None:
        return
    if wait := key.quota.take(items) if items else key.quota.wait_ms(1):
        detail = f"the quota of {key.name} is {key.quota.rate:g} items a second: wait {wait} ms"
        raise Problem("quota_exceeded", detail, retry_after_ms=wait)


def _host(header: str) -> str:
    """Without its port. An IPv6 address keeps its brackets."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdigit() else header).lower()
