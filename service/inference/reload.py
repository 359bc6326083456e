"""Watches the bundle folders and replaces models while requests run."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal

import structlog

from concord.model.bundle import BundleError
from concord.service.inference.registry import ModelRegistry
from concord.service.inference.served_model import ServedModel

log = structlog.get_logger(__name__)

State = Literal["ready", "failing", "failed"]
Signature = tuple[tuple[str, int, int, int], ...]


class BundleWatcher:
    """Calls ``replace`` for each bundle folder that has changed. Used on one event loop.

    Args:
        find_folders: the bundle folders that exist now; raises BundleError. Called in a worker thread.
        replace: serves what the folder holds now, or logs why it cannot.
        watch_seconds: between two checks for changes. 0: only when ``reload`` is called.
    """

    def __init__(
        self,
        find_folders: Callable[[], list[Path]],
        replace: Callable[[Path], Awaitable[None]],
        watch_seconds: float,
    ) -> None:
        self._find_folders = find_folders
        self._replace = replace
        self._watch_seconds = watch_seconds
        self._signatures: dict[Path, Signature | None] = {}
        self._requested = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def note(self, folders: Sequence[Path]) -> None:
        """These folders are served as they are now."""
        self._signatures = {folder: _signature(folder) for folder in folders}

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop watching; a replacement that is under way is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def reload(self) -> None:
        """Check every folder again soon, even if it did not change."""
        self._signatures = dict.fromkeys(self._signatures)
        self._requested.set()

    async def refresh(self) -> None:
        """Replace what has changed in the folders."""
        async with self._refreshing:
            try:
                folders = await asyncio.to_thread(self._find_folders)
            except BundleError as error:
                folders = []
                log.error("no bundles found: the current ones are served on", reason=str(error))
            for folder in dict.fromkeys([*self._signatures, *folders]):
                signature = await asyncio.to_thread(_signature, folder)
                if signature != self._signatures.get(folder):
                    await self._replace(folder)
                    self._signatures[folder] = signature

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._watch_seconds or None):
                    await self._requested.wait()
            self._requested.clear()
            await self.refresh()


class Reloader:
    """Started and stopped on one event loop; it starts and stops the registry's models with it.

    A folder is replaced in two steps: ``prepare`` opens and checks what it holds next to the running model, and ``commit`` or
    ``abort`` follows. So several processes can replace it together or not at all.

    Args:
        open_model: makes a model from a bundle folder; raises BundleError. Called in a worker thread.
        find_folders, watch_seconds: as ``BundleWatcher``.
        retire_seconds: that a replaced model has to finish its jobs.
        watch: False leaves it to another process to call ``prepare``.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        open_model: Callable[[Path], ServedModel],
        find_folders: Callable[[], list[Path]],
        *,
        watch_seconds: float,
        retire_seconds: float,
        watch: bool = True,
    ) -> None:
        self.registry = registry
        self._open_model = open_model
        self._retire_seconds = retire_seconds
        self._retired: set[ServedModel] = set()
        self._prepared: dict[Path, ServedModel | None] = {}
        self._failures: dict[Path, str] = {}
        self._watch = watch
        self._watcher = BundleWatcher(find_folders, self._replace, watch_seconds)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Warm up and check every model, then watch the folders."""
        self._watcher.note(self.registry.folders)
        for model in self.registry.all():
            await model.start()
        if self._watch:
            self._watcher.start()

    async def stop(self) -> None:
        """Stop watching and end every inference thread."""
        await self._watcher.stop()
        for task in self._tasks:
            task.cancel()
        prepared = {model for model in self._prepared.values() if model is not None}
        stopping = [model.stop() for model in {*self.registry.all(), *self._retired, *prepared}]
        await asyncio.gather(*self._tasks, *stopping, return_exceptions=True)

    def reload(self) -> None:
        """Check every folder again soon, even if it did not change."""
        self._watcher.reload()

    async def refresh(self) -> None:
        """Serve what has changed in the folders. A folder that cannot be loaded changes nothing and is logged."""
        await self._watcher.refresh()

    def state(self, model: ServedModel) -> State:
        """failed: its folder now holds something that cannot be loaded, and the model from before is served on."""
        if model.runtime.bundle.path in self._failures:
            return "failed"
        return "ready" if model.ready() else "failing"

    def unserved_failures(self) -> list[Path]:
        """Folders that could not be loaded and from which nothing is served."""
        return [folder for folder in self._failures if self.registry.at(folder) is None]

    async def prepare(self, folder: Path) -> str | None:
        """Open the bundle in the folder and check it next to the running model. Returns why it cannot be served, or None."""
        old = self.registry.at(folder)
        new: ServedModel | None = None
        try:
            new = await asyncio.to_thread(self._open_model, folder)
            if old is not None and new.runtime.bundle.sha256 == old.runtime.bundle.sha256:
                new = None
            else:
                self.registry.check_put(folder, new)
                await new.start()
                if not new.ready():
                    raise BundleError(f"{folder}: {new.checks()}")
        except BaseException as error:
            if new is not None:
                await new.stop()
            if not isinstance(error, Exception):
                raise
            return str(error)
        self._prepared[folder] = new
        return None

    def commit(self, folder: Path) -> None:
        """Switch over to what ``prepare`` has opened."""
        new, old = self._prepared.pop(folder), self.registry.at(folder)
        self._failures.pop(folder, None)
        if new is None:
            return
        self.registry.put(folder, new)
        log.warning("bundle loaded", bundle=new.label, instead_of=old.label if old else None)
        if old is not None:
            self._retired.add(old)
            self._spawn(self._retire(old))

    async def abort(self, folder: Path, reason: str) -> None:
        """Serve on as before. What ``prepare`` has opened, if anything, is closed."""
        self._failures[folder] = reason
        log.error("bundle not loaded: the current one is served on", folder=folder.name, reason=reason)
        new = self._prepared.pop(folder, None)
        if new is not None:
            await new.stop()

    async def _replace(self, folder: Path) -> None:
        reason = await self.prepare(folder)
        if reason is None:
            self.commit(folder)
        else:
            await self.abort(folder, reason)

    async def _retire(self, old: ServedModel) -> None:
        """Let it finish its jobs, then free it."""
        await old.stop(self._retire_seconds)
        self._retired.discard(old)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _signature(folder: Path) -> Signature:
    """Changes when a file does, or the file that a symbolic link points to. Empty if there is no folder."""
    try:
        stats = [(entry.name, entry.stat() if entry.exists() else entry.lstat()) for entry in folder.iterdir()]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats))
