import httpx

from concord.model.runtime import Runtime


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
