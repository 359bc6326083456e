import contextlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from concord.client import Client
from concord.model.runtime import Runtime
from tests.support.bundles import write_copy


def test_model_list_describes_the_bundle(client: httpx.Client, runtime: Runtime) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    manifest = runtime.bundle.manifest
    assert (model["id"], model["version"], model["latent"], model["state"]) == (
        "digits",
        manifest.version,
        manifest.latent,
        "ready",
    )
    assert [(m["name"], m["kind"], tuple(m["shape"])) for m in model["modalities"]] == [
        (m.name, m.kind, m.shape) for m in manifest.modalities
    ]
    assert model["provenance"]["sha256"] == runtime.bundle.sha256
    assert model["limits"]["max_items"] == 32
    assert str(runtime.bundle.path) not in client.get("/v1/models").text


def test_model_is_found_by_name_or_version(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/digits").json() == model
    assert client.get(f"/v1/models/digits@{model['version']}").json() == model


def test_unknown_model_gets_404(client: httpx.Client) -> None:
    response = client.get("/v1/models/letters")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_model")


@pytest.mark.parametrize(("limit", "expected"), [(64, 4), (3, 3), (0, 0)])
def test_model_has_the_recommended_steps_of_its_manifest_within_the_limit(
    serve: Callable[..., contextlib.AbstractContextManager[httpx.Client]], tmp_path: Path, limit: int, expected: int
) -> None:
    written = write_copy(tmp_path / "copy", name="copy", metrics={"recommended_steps": 4})
    with serve(Runtime(written), max_refine_steps=limit) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["recommended_refine_steps"] == expected
        with Client(str(client.base_url)) as connected:
            assert connected.models()[0].recommended_refine_steps == expected
        embedded = client.post("/embed", json={"inputs": [{"word": "seven"}]}).json()
        assert embedded["data"][0]["refinement"] is None  # the default is still no step


def test_model_without_recommended_steps_has_null(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["recommended_refine_steps"] is None
