"""Several models in one service, chosen by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concord.model import bundle
from concord.model.bundle import BundleError
from concord.model.runtime import Runtime
from concord.service.inference.registry import ModelRegistry, _order
from concord.service.inference.served_model import ServedModel
from concord.service.settings import Settings
from concord.service.telemetry.metrics import Metrics
from tests.support.server import Serve

WriteBundle = Callable[..., Path]


def make_registry(*folders: Path, **options: Any) -> ModelRegistry:
    settings = Settings(threads=1, watch_seconds=0, **options)
    models = [ServedModel(Runtime.load(folder, threads=1), settings, Metrics({"version": "0"})) for folder in folders]
    return ModelRegistry(models, settings.default_model)


def test_every_route_uses_the_model_that_is_named(serve: Serve, runtime: Runtime, tiny_bundle: bundle.Bundle) -> None:
    with serve(runtime, Runtime(tiny_bundle, threads=1, max_batch=4, fixed_batches=True), default_model="digits") as client:
        models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
        assert {name: [m["name"] for m in model["modalities"]] for name, model in models.items()} == {
            "digits": ["digit", "photo", "word"],
            "tiny": ["image", "text", "vector", "binary"],
        }
        for model, inputs in (("digits", {"word": "seven"}), ("tiny", {"text": "abc"}), ("tiny@1", {"text": "abc"})):
            response = client.post("/embed", json={"model": model, "inputs": [inputs]})
            expected = models[model.partition("@")[0]]
            assert response.json()["model"] == expected["id"]
            assert response.json()["dimensions"] == expected["latent"]
            assert response.headers["x-model-version"] == expected["version"]
        assert client.post("/embed", json={"inputs": [{"word": "seven"}]}).json()["model"] == "digits"
        wrong_modality = client.post("/embed", json={"model": "tiny", "inputs": [{"word": "seven"}]}).json()
        assert wrong_modality["code"] == "unknown_modality"
        assert "image, text, vector, binary" in wrong_modality["detail"]
        assert client.post("/embed", params={"model": "tiny"}, files={"text": (None, "abc")}).json()["model"] == "tiny"
        openai = client.post("/v1/embeddings", json={"model": "tiny", "input": "abc"}).json()
        assert (openai["model"], len(openai["data"][0]["embedding"])) == ("tiny", models["tiny"]["latent"])
        unknown = client.post("/embed", json={"model": "letters", "inputs": [{"word": "seven"}]})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_model")
        assert "tiny@1" in unknown.json()["detail"]
        assert set(client.get("/readyz").json()["checks"]) >= {"tiny@1/golden", f"digits@{models['digits']['version']}/golden"}
        metrics = client.get("/metrics").text
        assert 'concord_bundle_state{name="tiny",state="ready",version="1"} 1.0' in metrics
        assert f'sha256="{tiny_bundle.sha256}"' in metrics
        runs = 'concord_graph_runs_total{graph="decode-vector",name="tiny",size="%d",version="1"}'
        assert f"{runs % 1} 1.0" in metrics, "the warm-up"
        assert f"{runs % 4} 0.0" not in metrics
        assert 'concord_graph_padding_rows_total{graph="refine",name="tiny",version="1"}' in metrics
        assert 'concord_graph_runs_total{graph="encode",name="digits"' not in metrics


def test_choose_name_returns_the_highest_version(write_bundle: WriteBundle) -> None:
    folders = [write_bundle(name, version=name) for name in ("1.9", "1.10", "1.2")]
    registry = make_registry(*folders)
    assert [model.label for model in registry.all()] == ["tiny@1.2", "tiny@1.9", "tiny@1.10"]
    assert registry.choose(None) is registry.choose("tiny") is registry.choose("tiny@1.10")
    assert registry.choose("tiny@1.9").manifest.version == "1.9"
    assert make_registry(*folders, default_model="tiny@1.2").choose(None).manifest.version == "1.2"


@pytest.mark.parametrize("versions", [("9", "10"), ("1.9", "1.10"), ("1.2-rc1", "1.2-rc2"), ("2", "a"), ("v9", "v10")])
def test_versions_sort_naturally(versions: tuple[str, str]) -> None:
    assert _order(f"tiny@{versions[0]}") < _order(f"tiny@{versions[1]}")


def test_registry_rejects_conflicting_names(served_folder: Path, write_bundle: WriteBundle, runtime: Runtime) -> None:
    same_version = write_bundle("other", version="1.0")
    with pytest.raises(BundleError, match=r"tiny@1\.0 is served from another folder"):
        make_registry(served_folder, same_version)
    with pytest.raises(BundleError, match="CONCORD_DEFAULT_MODEL"):
        make_registry(served_folder, runtime.bundle.path)
    with pytest.raises(BundleError, match="letters is not among"):
        make_registry(served_folder, default_model="letters")
