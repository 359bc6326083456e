"""The service's client for Python: ``Client`` blocks, ``AsyncClient`` awaits, and both do the same.

::

    with Client("http://localhost:8000") as client:
        response = client.embed([{"photo": Path("7.png"), "word": "seven"}, {"word": "three"}], refine={"steps": 4})
        response.matrix  # (2, latent)

An item is a dict or a row of a pandas DataFrame; ``inputs`` may also be a whole DataFrame. A value of an item is a string (a
text; or base64 or a data URL), a list of strings (texts of the same thing, for a modality with a frozen encoder), a path or
bytes (of an image or a sound), a Pillow image, samples of a sound with their rate, an array or anything that NumPy can convert
to one (a PyTorch tensor, a pandas Series), or any JSON value that the service accepts. None and NaN are absent modalities.

An array of one axis is a vector or attributes. An array of two or three axes is a picture, (height, width), (height, width,
channels) or (channels, height, width), of bool, uint8, uint16 or floats in [0, 1]. The samples of a sound are (samples,) or
(samples, channels), of int16 or floats in [-1, 1], as ``soundfile.read`` returns them. A picture of any other type or range, a
number that is not finite and a value of another type raise ValueError or TypeError with their place: ``/inputs/1/photo``.

A call without a result raises a ``ServiceError``, whose subclasses name the kind of error, or an ``httpx.TransportError`` if
there was no response.

If the service is overloaded (503), a quota is spent (429) or the connection is refused, the call is retried after the time that
the service names, or else with exponential backoff; with jitter, at most ``retries`` times, and never beyond ``timeout``, which
spans all attempts. Calls change nothing on the service, so retrying is safe.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeVar, Unpack

import httpx

from concord.client import responses
from concord.client.requests import EmbedOptions, GenerateOptions, Item, body
from concord.client.responses import Embeddings, Generation, Model, Response

T = TypeVar("T")

BACKOFF_SECONDS = 0.1
GRACE_SECONDS = 1.0
"""Added to the deadline on the client's side, so that the server reports a passed deadline first."""
_RETRIED_STATUSES = frozenset({429, 503})
_CONNECTION_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout)


@dataclass(frozen=True)
class Attempt:
    """One HTTP request to send. ``timeout`` in seconds."""

    method: str
    path: str
    content: bytes | None
    timeout: float

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``httpx.Client.request``."""
        headers = {"X-Request-Timeout-Ms": str(max(1, int(1000 * self.timeout)))}
        if self.content is not None:
            headers["Content-Type"] = "application/json"
        limit = self.timeout + GRACE_SECONDS
        return {"method": self.method, "url": self.path, "content": self.content, "headers": headers, "timeout": limit}


Outcome = httpx.Response | httpx.TransportError
Steps = Generator[Attempt | float, Outcome | None, T]
"""The steps of a call: an attempt to send, whose outcome is sent back into the generator, or seconds to wait."""


@dataclass(frozen=True)
class _Calls:
    """The calls without any I/O, shared by both clients. ``timeout``, in seconds, spans all attempts."""

    timeout: float
    retries: int

    def embed(self, inputs: Item | Iterable[Item], options: EmbedOptions) -> Steps[Embeddings]:
        return responses.embeddings((yield from self._post("/embed", inputs, dict(options))))

    def cross_generate(self, inputs: Item | Iterable[Item], options: GenerateOptions) -> Steps[Response[Generation]]:
        fields = dict(options)
        output = {name: fields.pop(name) for name in ("image", "audio", "spectrogram") if name in fields}
        if output:
            fields["output"] = output
        return responses.generations((yield from self._post("/cross-generate", inputs, fields)))

    def models(self) -> Steps[list[Model]]:
        return responses.models((yield from self._attempts("GET", "/v1/models", None, self.timeout)))

    def ready(self) -> Steps[bool]:
        outcome = yield Attempt("GET", "/readyz", None, self.timeout)
        return isinstance(outcome, httpx.Response) and outcome.status_code == 200

    def _post(self, path: str, inputs: Item | Iterable[Item], options: dict[str, Any]) -> Steps[httpx.Response]:
        timeout = float(options.pop("timeout", self.timeout))
        return (yield from self._attempts("POST", path, body(inputs, {**options, "encoding_format": "base64"}), timeout))

    def _attempts(self, method: str, path: str, content: bytes | None, timeout: float) -> Steps[httpx.Response]:
        end = time.monotonic() + timeout
        retry = 0
        while True:
            outcome = yield Attempt(method, path, content, end - time.monotonic())
            if isinstance(outcome, httpx.Response) and outcome.status_code not in _RETRIED_STATUSES:
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
    """Seconds to wait before the next attempt: at least what the service requested, and up to half as much again, so that
    clients that were rejected at the same time do not retry at the same time."""
    requested = 0.0
    if isinstance(outcome, httpx.Response):
        for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            if outcome.headers.get(header, "").isdigit():
                requested = unit * int(outcome.headers[header])
                break
    return (requested or BACKOFF_SECONDS * 2**retry) * random.uniform(1, 1.5)


class Client:
    """The blocking client. Thread-safe.

    Args:
        url: of the service, such as ``http://localhost:8000``.
        key: an API key, if the service requires one.
        timeout: seconds that a call may take, with all attempts.
        retries: attempts after the first.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        self._calls = _Calls(timeout, retries)
        self._http = httpx.Client(base_url=url, headers=_headers(key))

    def embed(self, inputs: Item | Iterable[Item], **options: Unpack[EmbedOptions]) -> Embeddings:
        """An embedding of each item, from the modalities that it has."""
        return self._do(self._calls.embed(inputs, options))

    def cross_generate(self, inputs: Item | Iterable[Item], **options: Unpack[GenerateOptions]) -> Response[Generation]:
        """The modalities that each item lacks, or the ``targets``, generated from those that it has."""
        return self._do(self._calls.cross_generate(inputs, options))

    def models(self) -> list[Model]:
        """The bundles that are served."""
        return self._do(self._calls.models())

    def ready(self) -> bool:
        """Whether the service accepts calls now."""
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
            except _CONNECTION_ERRORS as error:
                outcome = error


class AsyncClient:
    """The asynchronous client, with the same methods as ``Client``. For one event loop."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        self._calls = _Calls(timeout, retries)
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key))

    def embed(self, inputs: Item | Iterable[Item], **options: Unpack[EmbedOptions]) -> Awaitable[Embeddings]:
        return self._do(self._calls.embed(inputs, options))

    def cross_generate(
        self, inputs: Item | Iterable[Item], **options: Unpack[GenerateOptions]
    ) -> Awaitable[Response[Generation]]:
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
            except _CONNECTION_ERRORS as error:
                outcome = error


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
