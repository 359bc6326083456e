"""The bundles that are served: found in their folders, chosen by name, replaced while requests run."""

import asyncio
import contextlib
import re
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import structlog
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from model.bundle import BundleError
from model.modality import Modality
from model.runtime import Runtime
from service.decoding import Decoding
from service.errors import Problem
from service.serving import Serving
from service.settings import Settings
from service.telemetry import Metrics

log = structlog.get_logger(__name__)

State = Literal["ready", "failing", "failed"]
Signature = tuple[tuple[str, int, int, int], ...]


class Bundles(Collector):
    """One serving a folder. Opened by ``start``, closed by ``stop``, on one event loop; ``choose`` is for any thread.

    Args:
        opened: the bundles, each of a folder of its own.

    Raises:
        BundleError: two have the same name and version, or which one is the default is open.
    """

    def __init__(self, opened: Sequence[Runtime], settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        """Set once: the process will end, and nobody should send more requests."""
        self._served = {runtime.bundle.path: Serving(runtime, settings, metrics) for runtime in opened}
        self._names: dict[str, Serving] = {}
        names = {serving.manifest.name for serving in self._served.values()}
        if settings.default_model is None and len(names) > 1:
            raise BundleError(f"several models are served, {sorted(names)}: name one in CONCORD_DEFAULT_MODEL")
        self._default = settings.default_model or names.pop()
        self._names = self._named(self._served)
        self._retired: set[Serving] = set()
        self._failures: dict[Path, str] = {}
        self._seen: dict[Path, Signature] = {}
        self._asked = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.decoding = Decoding(settings.decode_threads, settings.max_queue_items, metrics)
        metrics.watch(lambda: sum(s.engine.queue_depth for s in self.all()), self.ready)
        metrics.registry.register(self)

    async def start(self) -> None:
        """Warm and check every bundle, then watch their folders."""
        self._seen = {folder: _signature(folder) for folder in self._served}
        for serving in self.all():
            await serving.start()
        self._spawn(self._watch())

    async def stop(self) -> None:
        """End every inference thread and the watch."""
        for task in self._tasks:
            task.cancel()
        ending = [serving.stop() for serving in {*self._served.values(), *self._retired}]
        await asyncio.gather(*self._tasks, *ending, return_exceptions=True)
        self.decoding.stop()

    def all(self) -> list[Serving]:
        """In the order of their names."""
        return sorted(self._served.values(), key=lambda serving: _order(serving.label))

    def choose(self, model: str | None) -> Serving:
        """The bundle of a name, of name@version, or the default; of several versions of a name the highest.

        Raises:
            Problem: 404, there is none.
        """
        serving = self._names.get(self._default if model is None else model)
        if serving is None:
            raise Problem("unknown_model", f"no model of this name is served: there is {', '.join(sorted(self._names)[:32])}")
        return serving

    def current(self, chosen: Serving, model: str | None) -> Serving:
        """What is served from the same folder now, for ``chosen`` may have been replaced since: it takes the same rows.

        Raises:
            Problem: 404, ``model`` asked for the version that was there.
        """
        serving = self._served[chosen.runtime.bundle.path]
        return serving if serving is chosen or model is None or "@" not in model else self.choose(model)

    @property
    def most_values(self) -> int:
        """A body with more commas than this is right for no bundle."""
        return max(serving.reader.most_values for serving in self._served.values())

    def state(self, serving: Serving) -> State:
        """failed: what lies in its folder now could not be loaded; what was there before is served on."""
        if serving.runtime.bundle.path in self._failures:
            return "failed"
        return "ready" if serving.ready() else "failing"

    def modalities(self) -> tuple[Modality, ...]:
        """Of all bundles."""
        return tuple(dict.fromkeys(modality for serving in self.all() for modality in serving.runtime.modalities))

    def liveness(self) -> dict[str, str]:
        """A check of each inference thread."""
        return {f"{serving.label}/inference": serving.alive() for serving in self.all()}

    def checks(self) -> dict[str, str]:
        """Everything that readiness asks for, each "ok" or what is wrong."""
        checks = {f"{s.label}/{name}": answer for s in self.all() for name, answer in s.checks().items()}
        return {"accepting": "the server is stopping" if self.draining else "ok", **checks}

    def ready(self) -> bool:
        return all(answer == "ok" for answer in self.checks().values())

    def refusal(self, coming: int = 0) -> Problem | None:
        """503, where a request would be refused now: that costs least before its body is read.

        Args:
            coming: requests that were let in and are not being decoded yet.
        """
        if (overrun := self.decoding.refusal()) is not None:
            return overrun
        first = None
        for serving in self._served.values():
            refusal = serving.refusal(self.decoding.held + coming)
            if refusal is None:
                return None
            first = first or refusal
        return first

    def admit(self) -> None:
        """Raises the refusal."""
        if (refusal := self.refusal()) is not None:
            raise refusal

    def reload(self) -> None:
        """Look at every folder again, soon, also at those that did not change."""
        self._seen.clear()
        self._asked.set()

    async def refresh(self) -> None:
        """Serve what has changed in the folders. Whatever cannot be served leaves things as they are, and is told."""
        async with self._refreshing:
            try:
                folders = await asyncio.to_thread(self.settings.bundle_folders) if self.settings.bundles else []
            except BundleError as error:
                folders = []
                log.error("no bundles found: the old ones are served on", reason=str(error))
            for folder in dict.fromkeys([*self._served, *folders]):
                signature = await asyncio.to_thread(_signature, folder)
                if signature != self._seen.get(folder):
                    await self._replace(folder)
                    self._seen[folder] = signature

    async def _replace(self, folder: Path) -> None:
        """Open what lies in the folder beside what is served from it, check it, and let it take over."""
        old = self._served.get(folder)
        new: Serving | None = None
        try:
            runtime = await asyncio.to_thread(Runtime.load, folder, device=self.settings.device, threads=self.settings.threads)
            if old is None or runtime.bundle.sha256 != old.runtime.bundle.sha256:
                new = Serving(runtime, self.settings, self.metrics)
                served = {**self._served, folder: new}
                names = self._named(served)
                if old is not None:
                    _check_interface(old, new)
                await new.start()
                if not new.ready():
                    raise BundleError(f"{folder}: {new.checks()}")
        except BaseException as error:
            if new is not None:
                await new.stop()
            if not isinstance(error, Exception):
                raise
            self._failures[folder] = str(error)
            log.error("bundle not loaded: what was served before is served on", folder=folder.name, reason=str(error))
            return
        self._failures.pop(folder, None)
        if new is None:
            return
        # From here on nothing waits: every request is submitted to the one or to the other.
        self._served, self._names = served, names
        log.warning("bundle loaded", bundle=new.label, instead_of=old.label if old else None)
        if old is not None:
            self._retired.add(old)
            self._spawn(self._retire(old))

    async def _retire(self, old: Serving) -> None:
        """What it holds ends on it; then it is freed."""
        await old.stop(self.settings.request_timeout_ms / 1000)
        self._retired.discard(old)

    def _named(self, served: dict[Path, Serving]) -> dict[str, Serving]:
        names: dict[str, Serving] = {}
        for serving in sorted(served.values(), key=lambda one: _order(one.label)):
            if serving.label in names:
                raise BundleError(f"{serving.runtime.bundle.path}: {serving.label} is served from another folder already")
            names[serving.label] = names[serving.manifest.name] = serving
        if self._default not in names:
            raise BundleError(f"the default model {self._default} is not among {sorted(names)}")
        return names

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.watch_seconds or None):
                    await self._asked.wait()
            self._asked.clear()
            await self.refresh()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the metrics: which bundles there are, and how they are."""
        info = GaugeMetricFamily(
            "concord_bundle_info", "A bundle that is served.", labels=("name", "version", "sha256", "device")
        )
        state = GaugeMetricFamily("concord_bundle_state", "1: the bundle's state.", labels=("name", "version", "state"))
        for serving in self.all():
            manifest, runtime = serving.manifest, serving.runtime
            info.add_metric((manifest.name, manifest.version, runtime.bundle.sha256, runtime.device), 1)
            state.add_metric((manifest.name, manifest.version, self.state(serving)), 1)
        for folder in self._failures.keys() - self._served.keys():
            state.add_metric((folder.name, "", "failed"), 1)
        yield from (info, state)


def _check_interface(old: Serving, new: Serving) -> None:
    """Who asked the old one must be able to go on with the new one: with requests in flight, with vectors that were kept."""
    for what in ("name", "latent", "modalities"):
        if getattr(old.manifest, what) != getattr(new.manifest, what):
            raise BundleError(
                f"{new.runtime.bundle.path}: {what} differs from what is served, {old.label}: start the service anew for that, "
                "or put the bundle into a folder of its own"
            )


def _order(label: str) -> list[tuple[bool, int | str]]:
    """Versions sort as people count: 10 after 9."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.findall(r"\d+|\D+", label)]


def _signature(folder: Path) -> Signature:
    """Changes when a file does. Empty where there is no folder."""
    try:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in folder.iterdir()]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats))
