"""The service's client for Python: ``Client`` blocks, ``AsyncClient`` awaits, and both do the same.

::

    with Client("http://localhost:8000") as client:
        reply = client.embed([{"photo": Path("7.png"), "word": "seven"}, {"word": "three"}], refine={"steps": 4})
        reply.matrix  # (2, latent)

A value of an item may be a string (a text; or base64 or a data URL), a path or bytes (an image file), a Pillow image, a NumPy
array, or anything that JSON has and the service takes. An array of one axis is a vector or attributes; of two or three it is a
picture, (height, width) or (height, width, channels), of uint8 or of floats in [0, 1].

A call that gets no result raises a ``replies.ServiceError``, whose subclasses say who is to blame, or an
``httpx.TransportError`` where there was no answer at all.

Where the service is overloaded (503), a quota is spent (429) or nothing listens, the call is tried again after the time that it
was told or, where it was told none, after one that doubles; with jitter, ``retries`` times, and never beyond ``timeout``, which
spans all attempts. A call changes nothing and has the same answer each time, so that this is safe.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar, Unpack

import httpx

from service import replies
from service.inputs import EmbedOptions, GenerateOptions, Item, body
from service.replies import Embeddings, Generation, Model, Reply

T = TypeVar("T")

BACKOFF_SECONDS = 0.1
GRACE_SECONDS = 1.0
"""That a deadline has passed is for the server to say; it is given so long to do so."""
_RETRIED = frozenset({429, 503})
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)


@dataclass(frozen=True)
class Attempt:
    """One request to send. ``timeout`` in seconds."""

    method: str
    path: str
    content: bytes | None
    timeout: float

    def arguments(self) -> dict[str, Any]:
        """For ``httpx.Client.request``."""
        headers = {"X-Request-Timeout-Ms": str(max(1, int(1000 * self.timeout)))}
        if self.content is not None:
            headers["Content-Type"] = "application/json"
        limit = self.timeout + GRACE_SECONDS
        return {"method": self.method, "url": self.path, "content": self.content, "headers": headers, "timeout": limit}


Outcome = httpx.Response | httpx.TransportError
Steps = Generator[Attempt | float, Outcome | None, T]
"""A call, as what is to be done for it: to send an attempt, which answers with its outcome, or to wait for seconds."""


@dataclass(frozen=True)
class _Calls:
    """The calls, without the waiting. ``timeout`` in seconds, of all attempts; ``retries`` are those after the first."""

    timeout: float
    retries: int

    def embed(self, inputs: Item | Sequence[Item], options: EmbedOptions) -> Steps[Embeddings]:
        return replies.embeddings((yield from self._post("/embed", inputs, dict(options))))

    def cross_generate(self, inputs: Item | Sequence[Item], options: GenerateOptions) -> Steps[Reply[Generation]]:
        told = dict(options)
        if "image" in told:
            told["output"] = {"image": told.pop("image")}
        return replies.generations((yield from self._post("/cross-generate", inputs, told)))

    def models(self) -> Steps[list[Model]]:
        return replies.models((yield from self._exchange("GET", "/v1/models", None, self.timeout)))

    def ready(self) -> Steps[bool]:
        outcome = yield Attempt("GET", "/readyz", None, self.timeout)
        return isinstance(outcome, httpx.Response) and outcome.status_code == 200

    def _post(self, path: str, inputs: Item | Sequence[Item], options: dict[str, Any]) -> Steps[httpx.Response]:
        timeout = float(options.pop("timeout", self.timeout))
        return (yield from self._exchange("POST", path, body(inputs, {**options, "encoding_format": "base64"}), timeout))

    def _exchange(self, method: str, path: str, content: bytes | None, timeout: float) -> Steps[httpx.Response]:
        end = time.monotonic() + timeout
        retry = 0
        while True:
            outcome = yield Attempt(method, path, content, end - time.monotonic())
            if isinstance(outcome, httpx.Response) and outcome.status_code not in _RETRIED:
                return outcome
            assert outcome is not None
            wait = pause(outcome, retry)
            if retry == self.retries or time.monotonic() + wait >= end:
                break
            yield wait
            retry += 1
        if isinstance(outcome, httpx.TransportError):
            raise outcome
        return outcome


def pause(outcome: Outcome, retry: int) -> float:
    """Seconds to wait before the next attempt: never less than the service asked for, and up to half as much again, so that
    those who were refused together do not come back together."""
    told = 0.0
    if isinstance(outcome, httpx.Response):
        for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            if outcome.headers.get(header, "").isdigit():
                told = unit * int(outcome.headers[header])
                break
    return (told or BACKOFF_SECONDS * 2**retry) * random.uniform(1, 1.5)


class Client:
    """Blocks. For any number of threads.

    Args:
        url: of the service: ``http://localhost:8000``.
        key: an API key, where the service asks for one.
        timeout: seconds that a call may take, with all its attempts.
        retries: attempts after the first.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        self._calls = _Calls(timeout, retries)
        self._http = httpx.Client(base_url=url, headers=_headers(key))

    def embed(self, inputs: Item | Sequence[Item], **options: Unpack[EmbedOptions]) -> Embeddings:
        """An embedding of each item, from whatever modalities it has."""
        return self._do(self._calls.embed(inputs, options))

    def cross_generate(self, inputs: Item | Sequence[Item], **options: Unpack[GenerateOptions]) -> Reply[Generation]:
        """The modalities that each item lacks, or the ``targets``, generated from those that it has."""
        return self._do(self._calls.cross_generate(inputs, options))

    def models(self) -> list[Model]:
        """The bundles that are served."""
        return self._do(self._calls.models())

    def ready(self) -> bool:
        """Whether calls are taken now."""
        return self._do(self._calls.ready())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, steps: Steps[T]) -> T:
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                outcome = self._http.request(**step.arguments())
            except _UNREACHED as error:
                outcome = error


class AsyncClient:
    """Awaits; ``Client`` otherwise. For one event loop."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        self._calls = _Calls(timeout, retries)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key))

    def embed(self, inputs: Item | Sequence[Item], **options: Unpack[EmbedOptions]) -> Awaitable[Embeddings]:
        return self._do(self._calls.embed(inputs, options))

    def cross_generate(self, inputs: Item | Sequence[Item], **options: Unpack[GenerateOptions]) -> Awaitable[Reply[Generation]]:
        return self._do(self._calls.cross_generate(inputs, options))

    def models(self) -> Awaitable[list[Model]]:
        return self._do(self._calls.models())

    def ready(self) -> Awaitable[bool]:
        return self._do(self._calls.ready())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _do(self, steps: Steps[T]) -> T:
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            outcome = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                outcome = await self._http.request(**step.arguments())
            except _UNREACHED as error:
                outcome = error


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
