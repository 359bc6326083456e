"""API keys: read from a file, compared in constant time, reloaded when the file changes, each with its own quota.

The file holds one key a line, followed by an optional name and an optional quota, separated by white space::

    # key                                   name     items a second
    hSdu3nq0bY1fT2ZkTqk8                    ada      50
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08   grace

A key is at least 16 printable ASCII characters, or ``sha256:`` and the hexadecimal hash of one, which keeps it out of the
file. Logs show the name; the default name is the start of the hash. A quota counts items, with or without a result: a rate per
second on average, and after a pause a burst of one second's worth or of one full request, whichever is more.
"""

import asyncio
import contextlib
import hmac
import math
import re
import struct
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import structlog

from concord.service.http.shared_quotas import QuotasFullError, SharedLevels

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""A changed file takes effect within this time."""
_KEY = re.compile(r"[!-~]{16,512}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiKeysError(ValueError):
    """A file without usable keys. The message names the line and never quotes it."""


class Level(Protocol):
    """Items left in a bucket, and when it was filled, in seconds on the monotonic clock."""

    def locked(self, *, blocking: bool) -> contextlib.AbstractContextManager[Any]: ...
    def read(self) -> tuple[float, float]: ...
    def write(self, level: float, filled: float) -> None: ...


class OwnLevel:
    """The level of a bucket that this process alone takes from."""

    def __init__(self, level: float, filled: float) -> None:
        self._value = level, filled
        self._lock = threading.RLock()

    def locked(self, *, blocking: bool) -> threading.RLock:
        del blocking  # no thread has it for longer than microseconds
        return self._lock

    def read(self) -> tuple[float, float]:
        return self._value

    def write(self, level: float, filled: float) -> None:
        self._value = level, filled


class TokenBucket:
    """A quota: ``rate`` items a second on average, ``burst`` at once. More than a burst is taken from a full bucket, which then
    takes longer to fill. Thread-safe.

    Args:
        shared: where its level is, if other processes take from it too.
        identity: of the bucket among those that are shared.
    """

    def __init__(self, rate: float, burst: int, shared: SharedLevels | None = None, identity: bytes = b"") -> None:
        self.rate = rate
        self._most = max(rate, float(burst))
        self._level: Level
        if shared is None:
            self._level = OwnLevel(self._most, monotonic())
        else:
            own = sha256(identity + struct.pack("<dd", rate, self._most)).digest()[:8]
            self._level = shared.of(own, self._most, monotonic())

    def take(self, items: int, *, blocking: bool = True) -> int:
        """Take all of them or none.

        Args:
            blocking: whether to wait while another process takes from the same bucket.

        Returns:
            0 if they were taken, else the milliseconds until they could be.

        Raises:
            BlockingIOError: it would have to wait, and ``blocking`` is False.
        """
        with self._level.locked(blocking=blocking):
            level, now = self._refill()
            wait = self._wait_ms(items, level)
            if not wait:
                self._level.write(level - items, now)
            return wait

    def wait_ms(self, items: int, *, blocking: bool = True) -> int:
        """Milliseconds until so many items could be taken. ``blocking`` as in ``take``."""
        with self._level.locked(blocking=blocking):
            return self._wait_ms(items, self._refill()[0])

    def _refill(self) -> tuple[float, float]:
        """The level now, and now."""
        level, filled = self._level.read()
        now = monotonic()
        return min(self._most, level + (now - filled) * self.rate), now

    def _wait_ms(self, items: int, level: float) -> int:
        return max(0, math.ceil(1000 * (min(items, self._most) - level) / self.rate))


@dataclass(frozen=True)
class ApiKey:
    """``digest`` is the key's SHA-256; the key itself is not kept."""

    digest: bytes = field(repr=False)
    name: str
    quota: TokenBucket | None


class ApiKeys:
    """The keys of one file.

    Args:
        burst: items that every quota allows at once, at least.
        shared: where quotas are counted, if several processes serve them.

    Raises:
        ApiKeysError: there are none, or a line is wrong.
    """

    def __init__(self, path: Path, burst: int, shared: SharedLevels | None = None) -> None:
        self._path = path
        self._new_quota = partial(TokenBucket, burst=burst, shared=shared)
        self._content = _read(path)
        self._keys = _parse(self._content, self._new_quota, {})
        self._logged_error = ""

    def find(self, presented: bytes) -> ApiKey | None:
        """The key, if it is one. Takes the same time for every input."""
        digest = sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def refresh(self) -> None:
        """Reload the file. If it cannot be used, the keys stay as they are, which is logged once."""
        try:
            content = _read(self._path)
            if content != self._content:
                known = {key.digest: key.quota for key in self._keys if key.quota is not None}
                self._keys = _parse(content, self._new_quota, known)
                self._content = content
                log.info("API keys loaded", keys=len(self._keys))
            self._logged_error = ""
        except ApiKeysError as error:
            if str(error) != self._logged_error:
                self._logged_error = str(error)
                log.error("API keys not loaded: the current ones stay", reason=self._logged_error)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Refreshed inside this context."""

        async def poll() -> None:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                await asyncio.to_thread(self.refresh)

        task = asyncio.create_task(poll())
        try:
            yield
        finally:
            task.cancel()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ApiKeysError(f"API keys cannot be read from {path}: {reason}") from None


def _parse(content: str, new_quota: Callable[..., TokenBucket], known: dict[bytes, TokenBucket]) -> tuple[ApiKey, ...]:
    """Keys of a file. An unchanged quota keeps its state: those that are ``known``, by digest."""
    keys: dict[bytes, ApiKey] = {}
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        hashed = _HASHED.fullmatch(words[0])
        if len(words) > 3 or not (hashed or (_KEY.fullmatch(words[0]) and not words[0].startswith("sha256:"))):
            raise ApiKeysError(
                f"line {number} of the API keys is wrong: a key of 16 to 512 printable ASCII characters, or sha256: and 64 "
                "hexadecimal digits, followed by an optional name and items a second"
            )
        digest = bytes.fromhex(hashed[1]) if hashed else sha256(words[0].encode()).digest()
        name = words[1] if len(words) > 1 else digest.hex()[:8]
        if not _NAME.fullmatch(name):
            raise ApiKeysError(f"line {number} of the API keys is wrong: a name is 1 to 64 letters, digits, dots, dashes and _")
        if digest in keys:
            raise ApiKeysError(f"line {number} of the API keys is wrong: the key is listed twice")
        quota = None
        if len(words) == 3:
            rate = _rate(words[2], number)
            quota = known.get(digest)
            if quota is None or quota.rate != rate:
                try:
                    quota = new_quota(rate, identity=digest)
                except QuotasFullError as error:
                    raise ApiKeysError(str(error)) from None
        keys[digest] = ApiKey(digest, name, quota)
    if not keys:
        raise ApiKeysError("the file of API keys holds none, so every request would be rejected")
    return tuple(keys.values())


def _rate(word: str, number: int) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ApiKeysError(f"line {number} of the API keys is wrong: items a second must be a positive number")
    return rate
