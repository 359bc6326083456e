"""Several bundles, chosen by name; and bundles that change on disk while they are served."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model import bundle
from model.bundle import BundleError
from model.runtime import Posterior, Runtime
from service.bundles import Bundles, _order
from service.errors import Problem
from service.settings import Settings
from service.telemetry import Metrics
from service.work import Work
from tests.copies import cut_short, write_copy

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
Put = Callable[..., Path]
TEXT = Work({"text": np.ones(3, np.int64)}, seed=0, index=0)


@pytest.fixture
def put(tmp_path: Path, tiny_bundle: bundle.Bundle) -> Put:
    """``put("one", version="2")``: a folder of this name that holds the tiny bundle, so changed."""
    return lambda folder, **facts: write_copy(tmp_path / folder, tiny_bundle.path, **facts).path


@pytest.fixture
def place(put: Put) -> Path:
    """A folder that serves tiny, version 1.0."""
    return put("served", version="1.0")


def opened(*folders: Path) -> list[Runtime]:
    return [Runtime.load(folder, threads=1) for folder in folders]


def bundles_of(*folders: Path, **settings: Any) -> Bundles:
    return Bundles(opened(*folders), Settings(threads=1, watch_seconds=0, **settings), Metrics({"version": "0"}))


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


@contextlib.asynccontextmanager
async def started(bundles: Bundles) -> Any:
    await bundles.start()
    try:
        yield bundles
    finally:
        await bundles.stop()


def states(bundles: Bundles) -> list[tuple[str, str]]:
    return [(serving.label, bundles.state(serving)) for serving in bundles.all()]


def test_each_model_answers_in_its_own_modalities(serve: Serve, runtime: Runtime, tiny_bundle: bundle.Bundle) -> None:
    with serve(runtime, Runtime(tiny_bundle, threads=1), default_model="digits") as client:
        listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert {name: [m["name"] for m in model["modalities"]] for name, model in listed.items()} == {
            "digits": ["digit", "photo", "word"],
            "tiny": ["image", "text", "vector", "binary"],
        }
        for model, inputs in (("digits", {"word": "seven"}), ("tiny", {"text": "abc"}), ("tiny@1", {"text": "abc"})):
            response = client.post("/embed", json={"model": model, "inputs": [inputs]})
            assert response.json()["model"] == model.partition("@")[0]
            assert response.json()["dimensions"] == listed[model.partition("@")[0]]["latent"]
            assert response.headers["x-model-version"] == listed[model.partition("@")[0]]["version"]
        assert client.post("/embed", json={"inputs": [{"word": "seven"}]}).json()["model"] == "digits"
        mistaken = client.post("/embed", json={"model": "tiny", "inputs": [{"word": "seven"}]}).json()
        assert mistaken["code"] == "unknown_modality"
        assert "image, text, vector, binary" in mistaken["detail"]
        assert client.post("/embed", params={"model": "tiny"}, files={"text": (None, "abc")}).json()["model"] == "tiny"
        openai = client.post("/v1/embeddings", json={"model": "tiny", "input": "abc"}).json()
        assert (openai["model"], len(openai["data"][0]["embedding"])) == ("tiny", listed["tiny"]["latent"])
        unknown = client.post("/embed", json={"model": "letters", "inputs": [{"word": "seven"}]})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")
        assert "tiny@1" in unknown.json()["detail"]
        assert set(client.get("/readyz").json()["checks"]) >= {"tiny@1/golden", f"digits@{listed['digits']['version']}/golden"}
        info = client.get("/metrics").text
        assert 'concord_bundle_state{name="tiny",state="ready",version="1"} 1.0' in info
        assert f'sha256="{tiny_bundle.sha256}"' in info


def test_a_name_means_its_highest_version(put: Put) -> None:
    folders = [put(name, version=name) for name in ("1.9", "1.10", "1.2")]
    bundles = bundles_of(*folders)
    assert [serving.label for serving in bundles.all()] == ["tiny@1.2", "tiny@1.9", "tiny@1.10"]
    assert bundles.choose(None) is bundles.choose("tiny") is bundles.choose("tiny@1.10")
    assert bundles.choose("tiny@1.9").manifest.version == "1.9"
    assert bundles_of(*folders, default_model="tiny@1.2").choose(None).manifest.version == "1.2"


@pytest.mark.parametrize("versions", [("9", "10"), ("1.9", "1.10"), ("1.2-rc1", "1.2-rc2"), ("2", "a"), ("v9", "v10")])
def test_versions_sort_as_people_count(versions: tuple[str, str]) -> None:
    assert _order(f"tiny@{versions[0]}") < _order(f"tiny@{versions[1]}")


def test_names_at_odds_are_refused(place: Path, put: Put, runtime: Runtime) -> None:
    twin = put("twin", version="1.0")
    with pytest.raises(BundleError, match=r"tiny@1\.0 is served from another folder"):
        bundles_of(place, twin)
    with pytest.raises(BundleError, match="CONCORD_DEFAULT_MODEL"):
        bundles_of(place, runtime.bundle.path)
    with pytest.raises(BundleError, match="letters is not among"):
        bundles_of(place, default_model="letters")


def test_a_new_version_takes_over(place: Path, put: Put) -> None:
    async def test() -> None:
        async with started(bundles_of(place)) as bundles:
            old = bundles.choose(None)
            put("served", version="2.0")
            await bundles.refresh()
            assert states(bundles) == [("tiny@2.0", "ready")]
            assert bundles.current(old, "tiny") is bundles.choose(None)
            with pytest.raises(Problem, match=r"tiny@2\.0"):
                bundles.current(old, "tiny@1.0")
            assert len(await bundles.choose(None).submit([TEXT])) == 1
            while old.engine.running:
                await asyncio.sleep(0.01)

    run(test())


def inference_threads() -> int:
    """Of all services in this process."""
    return sum(thread.name == "inference" for thread in threading.enumerate())


# What lies in a folder that must not take over; each damages ``place`` or puts another bundle there.


def damage_cut(place: Path, _: Put) -> None:
    cut_short(place)


def damage_manifest(place: Path, _: Put) -> None:
    (place / bundle.MANIFEST).write_text("{}")


def damage_gone(place: Path, _: Put) -> None:
    place.rename(place.with_name(".gone"))


def damage_latent(_: Path, put: Put) -> None:
    put("served", version="2.0", latent=7)


def damage_name(_: Path, put: Put) -> None:
    put("served", version="2.0", name="letters")


def damage_modalities(place: Path, put: Put) -> None:
    manifest = bundle.read(place).manifest
    other = manifest.modalities[-1].model_copy(update={"attributes": ("green", "round")})
    put("served", version="2.0", modalities=[*manifest.modalities[:-1], other])


def damage_golden(place: Path, _: Put) -> None:
    with np.load(place / bundle.GOLDEN) as archive:
        golden = {key: archive[key] for key in archive.files}
    golden["mean"] = golden["mean"] + 1
    golden["objective"] = golden["objective"] + 1
    manifest = json.loads((place / bundle.MANIFEST).read_text())
    np.savez(place / bundle.GOLDEN, **golden)
    content = (place / bundle.GOLDEN).read_bytes()
    manifest["files"][bundle.GOLDEN] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (place / bundle.MANIFEST).write_text(json.dumps(manifest))


DAMAGES = [damage_cut, damage_manifest, damage_gone, damage_latent, damage_name, damage_modalities, damage_golden]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_what_cannot_take_over_leaves_the_old_one_serving(place: Path, put: Put, damage: Callable[[Path, Put], None]) -> None:
    others = inference_threads()

    async def test() -> None:
        async with started(bundles_of(place)) as bundles:
            expected = (await bundles.choose(None).submit([TEXT]))[0].mean
            damage(place, put)
            await bundles.refresh()
            assert states(bundles) == [("tiny@1.0", "failed")]
            assert bundles.ready()
            np.testing.assert_array_equal((await bundles.choose(None).submit([TEXT]))[0].mean, expected)
            assert 'concord_bundle_state{name="tiny",state="failed",version="1.0"} 1.0' in bundles.metrics.expose().decode()
            assert inference_threads() == others + 1
            if place.with_name(".gone").exists():
                place.with_name(".gone").rename(place)
            put("served", version="3.0")
            await bundles.refresh()
            assert states(bundles) == [("tiny@3.0", "ready")]

    run(test())


class Held(Runtime):
    """The real graphs behind a gate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def encode(self, inputs: Any, present: Any) -> Posterior:
        self.entered.set()
        assert self.gate.wait(30), "the test never opened the gate"
        return super().encode(inputs, present)


def test_a_request_in_flight_ends_on_the_version_it_began_with(serve: Serve, place: Path, put: Put) -> None:
    held = Held(bundle.read(place), threads=1)
    with serve(held, threads=1, watch_seconds=0.05) as client:
        held.gate.clear()
        held.entered.clear()
        answers: list[httpx.Response] = []
        ask = threading.Thread(target=lambda: answers.append(client.post("/embed", json={"inputs": [{"text": "abc"}]})))
        ask.start()
        assert held.entered.wait(20)
        put("served", version="2.0")
        while client.get("/v1/models/tiny").json()["version"] != "2.0":
            time.sleep(0.01)
        now = client.post("/embed", json={"inputs": [{"text": "abc"}]})
        assert now.headers["x-model-version"] == "2.0"
        assert not answers
        held.gate.set()
        ask.join()
        assert (answers[0].json()["model_version"], answers[0].headers["x-model-version"]) == ("1.0", "1.0")


def test_reloads_that_race_come_one_after_the_other(place: Path, put: Put) -> None:
    others = inference_threads()

    async def test() -> None:
        async with started(bundles_of(place)) as bundles:
            first = bundles.choose(None)
            put("served", version="2.0")
            await asyncio.gather(*(bundles.refresh() for _ in range(4)))
            assert states(bundles) == [("tiny@2.0", "ready")]
            while first.engine.running:
                await asyncio.sleep(0.01)
            assert inference_threads() == others + 1

    run(test())


def test_the_watch_finds_changes_and_new_folders_by_itself(tmp_path: Path, put: Put) -> None:
    put("one", version="1.0")

    async def test() -> None:
        settings = Settings(threads=1, watch_seconds=0.05, bundles=tmp_path)
        async with started(Bundles(opened(*settings.bundle_folders()), settings, Metrics({}))) as bundles:
            put("two", version="2.0")
            while ("tiny@2.0", "ready") not in states(bundles):
                await asyncio.sleep(0.02)
            assert bundles.choose("tiny").label == "tiny@2.0"
            cut_short(tmp_path / "one")
            while ("tiny@1.0", "failed") not in states(bundles):
                await asyncio.sleep(0.02)
            (tmp_path / "three").mkdir()
            (tmp_path / "three" / bundle.MANIFEST).write_text("nonsense")
            metric = 'concord_bundle_state{name="three",state="failed",version=""} 1.0'
            while metric not in bundles.metrics.expose().decode():
                await asyncio.sleep(0.02)
            assert bundles.ready()

    run(test())


def test_reload_looks_at_what_did_not_change_too(place: Path) -> None:
    async def test() -> None:
        async with started(bundles_of(place)) as bundles:
            serving = bundles.choose(None)
            bundles.reload()
            await asyncio.sleep(0.5)
            await bundles.refresh()
            assert states(bundles) == [("tiny@1.0", "ready")]
            assert bundles.choose(None) is serving

    run(test())
