"""API keys: read from a file, found in constant time, read anew when the file changes, each with its own quota.

The file holds one key a line, with an optional name and an optional quota behind it, parted by white space::

    # key                                   name     items a second
    hSdu3nq0bY1fT2ZkTqk8                    ada      50
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08   grace

A key is at least 16 printable ASCII characters, or ``sha256:`` and the hexadecimal hash of one, which keeps it out of the
file. Logs tell the name, which is the start of the hash where none is given. A quota counts items, whatever becomes of them:
so many a second on average, and after a pause a burst of one second's worth or of one full request, whichever is more.
"""

import asyncio
import contextlib
import hmac
import math
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import monotonic

import structlog

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
"""A changed file counts after this time at the latest."""
_KEY = re.compile(r"[!-~]{16,512}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeysError(ValueError):
    """A file that holds no usable keys. The message tells the line and never quotes it."""


class Bucket:
    """A quota: ``rate`` items a second on average, ``burst`` at once. For any thread."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self._most = self._level = max(rate, float(burst))
        self._filled = monotonic()
        self._lock = threading.RLock()

    def take(self, items: int) -> int:
        """Take them all or none.

        Returns:
            0 where they were taken, else the milliseconds until they could be.
        """
        with self._lock:
            wait = self.wait_ms(items)
            if not wait:
                self._level -= items
            return wait

    def wait_ms(self, items: int) -> int:
        """Milliseconds until so many items could be taken."""
        with self._lock:
            now = monotonic()
            self._level = min(self._most, self._level + (now - self._filled) * self.rate)
            self._filled = now
            return max(0, math.ceil(1000 * (items - self._level) / self.rate))


@dataclass(frozen=True)
class Key:
    """``digest`` is the key's SHA-256; the key itself is not kept."""

    digest: bytes = field(repr=False)
    name: str
    quota: Bucket | None


class Keys:
    """The keys of one file.

    Args:
        burst: items that every quota allows at once, at least.

    Raises:
        KeysError: there are none, or a line is wrong.
    """

    def __init__(self, path: Path, burst: int) -> None:
        self._path = path
        self._burst = burst
        self._content = _read(path)
        self._keys = _parse(self._content, burst, {})
        self._told = ""

    def find(self, presented: bytes) -> Key | None:
        """The key, if it is one. Takes the same time for a near miss, a far one and a hit."""
        digest = sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def refresh(self) -> None:
        """Read the file anew. Where it cannot be used the keys stay as they are, and the log says so once."""
        try:
            content = _read(self._path)
            if content != self._content:
                known = {key.digest: key.quota for key in self._keys if key.quota is not None}
                self._keys = _parse(content, self._burst, known)
                self._content = content
                log.info("API keys read", keys=len(self._keys))
            self._told = ""
        except KeysError as error:
            if str(error) != self._told:
                self._told = str(error)
                log.error("API keys not read: the old ones stay", reason=self._told)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Refreshed while this lasts."""

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
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeysError(f"API keys cannot be read from {path}: {reason}") from None


def _parse(content: str, burst: int, known: dict[bytes, Bucket]) -> tuple[Key, ...]:
    """Keys of a file. A quota that is already ``known``, by digest, and has not changed goes on as it stands."""
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        hashed = _HASHED.fullmatch(words[0])
        if len(words) > 3 or not (hashed or (_KEY.fullmatch(words[0]) and not words[0].startswith("sha256:"))):
            raise KeysError(
                f"line {number} of the API keys is wrong: a key of 16 to 512 printable ASCII characters, or sha256: and 64 "
                "hexadecimal digits, then perhaps a name and items a second"
            )
        digest = bytes.fromhex(hashed[1]) if hashed else sha256(words[0].encode()).digest()
        name = words[1] if len(words) > 1 else digest.hex()[:8]
        if not _NAME.fullmatch(name):
            raise KeysError(f"line {number} of the API keys is wrong: a name is 1 to 64 letters, digits, dots, dashes and _")
        if digest in keys:
            raise KeysError(f"line {number} of the API keys is wrong: the key stands there twice")
        quota = None
        if len(words) == 3:
            quota = Bucket(_rate(words[2], number), burst)
            if digest in known and known[digest].rate == quota.rate:
                quota = known[digest]
        keys[digest] = Key(digest, name, quota)
    if not keys:
        raise KeysError("the file of API keys holds none, which would let nobody in")
    return tuple(keys.values())


def _rate(word: str, number: int) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise KeysError(f"line {number} of the API keys is wrong: items a second must be a positive number")
    return rate
