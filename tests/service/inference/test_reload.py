"""Bundles that change on disk while they are served."""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from concord.model import bundle
from concord.model.runtime import Runtime
from concord.service.app import make_reloader
from concord.service.inference.jobs import InferenceJob
from concord.service.inference.registry import ModelRegistry, UnknownModel
from concord.service.inference.reload import Reloader
from concord.service.inference.served_model import ServedModel
from concord.service.settings import Settings
from concord.service.telemetry.metrics import Metrics
from concord.service.telemetry.model_metrics import ModelCollector
from tests.support.bundles import cut_short
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import wait_for, wait_for_async

WriteBundle = Callable[..., Path]
JOB = InferenceJob({"text": np.ones(3, np.int64)}, seed=0, index=0)
REQUEST = {"inputs": [{"text": "abc"}]}


def metrics_text(reloader: Reloader) -> str:
    metrics = Metrics({})
    metrics.registry.register(ModelCollector(reloader))
    return metrics.expose().decode()


def run_async(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


@contextlib.asynccontextmanager
async def running_reloader(*folders: Path, settings: Settings | None = None) -> AsyncIterator[Reloader]:
    settings = settings or Settings(threads=1, watch_seconds=0)
    metrics = Metrics({})
    models = [ServedModel(Runtime.load(folder, threads=1), settings, metrics) for folder in folders]
    reloader = make_reloader(ModelRegistry(models), settings, metrics)
    await reloader.start()
    try:
        yield reloader
    finally:
        await reloader.stop()


def states(reloader: Reloader) -> list[tuple[str, str]]:
    return [(model.label, reloader.state(model)) for model in reloader.registry.all()]


def inference_threads() -> int:
    """Return the number of inference threads of all services in this process."""
    return sum(thread.name == "inference" for thread in threading.enumerate())


def test_new_version_replaces_the_old_one(served_folder: Path, write_bundle: WriteBundle) -> None:
    async def test() -> None:
        async with running_reloader(served_folder) as reloader:
            old = reloader.registry.choose(None)
            write_bundle("served", version="2.0")
            await reloader.refresh()
            assert states(reloader) == [("tiny@2.0", "ready")]
            assert reloader.registry.current(old, "tiny") is reloader.registry.choose(None)
            with pytest.raises(UnknownModel, match=r"tiny@2\.0"):
                reloader.registry.current(old, "tiny@1.0")
            assert len(await reloader.registry.choose(None).run([JOB])) == 1
            await wait_for_async(lambda: not old.engine.running, message="the replaced engine still runs")

    run_async(test())


def test_new_version_behind_symbolic_links_replaces_the_old_one(
    tmp_path: Path, served_folder: Path, write_bundle: WriteBundle
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in served_folder.iterdir():
        (linked / file.name).symlink_to(file)

    async def test() -> None:
        async with running_reloader(linked) as reloader:
            write_bundle("served", version="2.0")
            await reloader.refresh()
            assert states(reloader) == [("tiny@2.0", "ready")]

    run_async(test())


# Contents of a folder that must not replace the model. Each function damages the folder or writes another bundle into it.


def damage_cut(folder: Path, _: WriteBundle) -> None:
    cut_short(folder)


def damage_manifest(folder: Path, _: WriteBundle) -> None:
    (folder / bundle.MANIFEST).write_text("{}")


def damage_gone(folder: Path, _: WriteBundle) -> None:
    folder.rename(folder.with_name(".gone"))


def damage_latent(_: Path, write_bundle: WriteBundle) -> None:
    write_bundle("served", version="2.0", latent=7)


def damage_name(_: Path, write_bundle: WriteBundle) -> None:
    write_bundle("served", version="2.0", name="letters")


def damage_modalities(folder: Path, write_bundle: WriteBundle) -> None:
    manifest = bundle.read(folder).manifest
    other = manifest.modalities[-1].model_copy(update={"attributes": ("green", "round")})
    write_bundle("served", version="2.0", modalities=[*manifest.modalities[:-1], other])


def damage_golden(folder: Path, _: WriteBundle) -> None:
    with np.load(folder / bundle.GOLDEN) as archive:
        golden = {key: archive[key] for key in archive.files}
    golden["mean"] = golden["mean"] + 1
    golden["objective"] = golden["objective"] + 1
    manifest = json.loads((folder / bundle.MANIFEST).read_text())
    np.savez(folder / bundle.GOLDEN, **golden)
    content = (folder / bundle.GOLDEN).read_bytes()
    manifest["files"][bundle.GOLDEN] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest))


DAMAGES = [damage_cut, damage_manifest, damage_gone, damage_latent, damage_name, damage_modalities, damage_golden]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_invalid_replacement_leaves_the_old_model_serving(
    served_folder: Path, write_bundle: WriteBundle, damage: Callable[[Path, WriteBundle], None]
) -> None:
    threads_before = inference_threads()

    async def test() -> None:
        async with running_reloader(served_folder) as reloader:
            expected = (await reloader.registry.choose(None).run([JOB]))[0].mean
            damage(served_folder, write_bundle)
            await reloader.refresh()
            assert states(reloader) == [("tiny@1.0", "failed")]
            assert all(model.ready() for model in reloader.registry.all())
            np.testing.assert_array_equal((await reloader.registry.choose(None).run([JOB]))[0].mean, expected)
            assert 'concord_bundle_state{name="tiny",state="failed",version="1.0"} 1.0' in metrics_text(reloader)
            assert inference_threads() == threads_before + 1
            if served_folder.with_name(".gone").exists():
                served_folder.with_name(".gone").rename(served_folder)
            write_bundle("served", version="3.0")
            await reloader.refresh()
            assert states(reloader) == [("tiny@3.0", "ready")]

    run_async(test())


def test_request_in_flight_finishes_on_its_version(serve: Serve, served_folder: Path, write_bundle: WriteBundle) -> None:
    gated = GatedRuntime(bundle.read(served_folder), threads=1)
    with serve(gated, threads=1, watch_seconds=0.05) as client:
        gated.close()
        responses: list[httpx.Response] = []
        request = threading.Thread(target=lambda: responses.append(client.post("/embed", json=REQUEST)))
        request.start()
        gated.wait_until_entered()
        write_bundle("served", version="2.0")
        wait_for(lambda: client.get("/v1/models/tiny").json()["version"] == "2.0")
        assert client.post("/embed", json=REQUEST).headers["x-model-version"] == "2.0"
        assert not responses
        gated.open()
        request.join()
        assert (responses[0].json()["model_version"], responses[0].headers["x-model-version"]) == ("1.0", "1.0")


def test_concurrent_refreshes_replace_once(served_folder: Path, write_bundle: WriteBundle) -> None:
    threads_before = inference_threads()

    async def test() -> None:
        async with running_reloader(served_folder) as reloader:
            old = reloader.registry.choose(None)
            write_bundle("served", version="2.0")
            await asyncio.gather(*(reloader.refresh() for _ in range(4)))
            assert states(reloader) == [("tiny@2.0", "ready")]
            await wait_for_async(lambda: not old.engine.running, message="the replaced engine still runs")
            assert inference_threads() == threads_before + 1

    run_async(test())


def test_watch_finds_changed_and_new_folders(tmp_path: Path, write_bundle: WriteBundle) -> None:
    write_bundle("one", version="1.0")

    async def test() -> None:
        settings = Settings(threads=1, watch_seconds=0.05, bundles=tmp_path)
        async with running_reloader(*settings.bundle_folders(), settings=settings) as reloader:
            write_bundle("two", version="2.0")
            await wait_for_async(lambda: ("tiny@2.0", "ready") in states(reloader))
            assert reloader.registry.choose("tiny").label == "tiny@2.0"
            cut_short(tmp_path / "one")
            await wait_for_async(lambda: ("tiny@1.0", "failed") in states(reloader))
            (tmp_path / "three").mkdir()
            (tmp_path / "three" / bundle.MANIFEST).write_text("nonsense")
            metric = 'concord_bundle_state{name="three",state="failed",version=""} 1.0'
            await wait_for_async(lambda: metric in metrics_text(reloader))
            assert all(model.ready() for model in reloader.registry.all())

    run_async(test())


def test_reload_of_an_unchanged_folder_keeps_the_model(served_folder: Path) -> None:
    async def test() -> None:
        async with running_reloader(served_folder) as reloader:
            model = reloader.registry.choose(None)
            opened: list[Path] = []
            open_model = reloader._open_model

            def recorded(folder: Path) -> ServedModel:
                opened.append(folder)
                return open_model(folder)

            reloader._open_model = recorded
            reloader.reload()
            await wait_for_async(lambda: opened == [served_folder], message="the folder was not opened again")
            await reloader.refresh()  # waits for the reload and finds nothing changed
            assert opened == [served_folder]
            assert states(reloader) == [("tiny@1.0", "ready")]
            assert reloader.registry.choose(None) is model

    run_async(test())
