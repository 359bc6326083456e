"""POST /embed and POST /cross-generate over HTTP."""

import base64
import io
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image

from concord.model import codec
from concord.model.modality import collate
from concord.model.runtime import Runtime
from tests.support.metrics import scrape
from tests.support.raw_http import connect, head
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import wait_for

SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(("digit", "photo", "word"), size)]


def embed(client: httpx.Client, *inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return _ok(client.post("/embed", json={"inputs": list(inputs), **options}))


def generate(client: httpx.Client, *inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return _ok(client.post("/cross-generate", json={"inputs": list(inputs), **options}))


def _ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
def gated(runtime: Runtime) -> GatedRuntime:
    return GatedRuntime(runtime.bundle, threads=1)


def select(values: dict[str, str], subset: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in subset}


def unpack(packed: str) -> np.ndarray:
    """Return float32 numbers from base64."""
    return np.frombuffer(base64.b64decode(packed), dtype="<f4")


def test_embed_mixed_subsets_return_the_runtimes_posterior(
    client: httpx.Client, runtime: Runtime, values: dict[str, str]
) -> None:
    body = embed(client, *(select(values, subset) for subset in SUBSETS), representation="mean_log_var")
    for data, subset in zip(body["data"], SUBSETS, strict=True):
        row = {m.name: codec.parse(m, values[m.name]) for m in runtime.modalities if m.name in subset}
        posterior = runtime.encode(*collate(runtime.modalities, [row]))
        np.testing.assert_allclose(data["embedding"], posterior.mean[0], atol=1e-5)
        np.testing.assert_allclose(data["log_var"], posterior.log_var[0], atol=1e-5)
        assert data["modalities"] == list(subset)
    assert body["dimensions"] == runtime.latent
    assert body["usage"] == {"items": 7, "images": 8, "text_characters": 20, "refine_steps": 0}


def test_embed_returns_ids_and_treats_null_as_absent(client: httpx.Client) -> None:
    body = embed(client, {"id": "a/é", "word": "two", "photo": None}, {"word": "two"})
    assert [(d["id"], d["index"], d["modalities"]) for d in body["data"]] == [("a/é", 0, ["word"]), (None, 1, ["word"])]


def test_base64_encoding_holds_the_same_numbers(client: httpx.Client) -> None:
    numbers = embed(client, {"word": "two"}, representation="mean_log_var")["data"][0]
    packed = embed(client, {"word": "two"}, representation="mean_log_var", encoding_format="base64")["data"][0]
    np.testing.assert_allclose(unpack(packed["embedding"]), numbers["embedding"], rtol=1e-6)
    np.testing.assert_allclose(unpack(packed["log_var"]), numbers["log_var"], rtol=1e-6)


def test_normalize_returns_a_unit_vector_of_the_same_direction(client: httpx.Client) -> None:
    plain = np.array(embed(client, {"word": "two"})["data"][0]["embedding"])
    unit = np.array(embed(client, {"word": "two"}, normalize=True)["data"][0]["embedding"])
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


def test_sampled_embedding_depends_on_seed_and_position_only(client: httpx.Client) -> None:
    def sample(seed: int) -> list[float]:
        return embed(client, {"word": "two"}, representation="sample", seed=seed)["data"][0]["embedding"]

    assert sample(3) == pytest.approx(sample(3), abs=1e-5)
    assert np.abs(np.subtract(sample(3), sample(4))).max() > 1e-2
    equal_items = embed(client, {"word": "two"}, {"word": "two"}, representation="sample", seed=3)["data"]
    difference = np.subtract(equal_items[0]["embedding"], equal_items[1]["embedding"])
    assert np.abs(difference).max() > 1e-2, "two items got the same noise"
    assert np.abs(np.subtract(sample(3), embed(client, {"word": "two"})["data"][0]["embedding"])).max() > 1e-2


@pytest.mark.parametrize(("subset", "objective"), [(("digit",), "observed"), (("digit", "photo", "word"), "elbo")])
def test_refinement_is_reported_and_changes_the_embedding(
    client: httpx.Client, values: dict[str, str], subset: tuple[str, ...], objective: str
) -> None:
    body = embed(client, select(values, subset), refine={"steps": 4, "trace": True})
    refinement = body["data"][0]["refinement"]
    assert (refinement["steps"], refinement["stopped"], refinement["objective"]) == (4, "steps", objective)
    assert refinement["after"] >= refinement["before"]
    assert len(refinement["trace"]) == 5
    assert refinement["trace"][0] == refinement["before"]
    assert body["usage"]["refine_steps"] == 4
    assert body["data"][0]["embedding"] != embed(client, select(values, subset))["data"][0]["embedding"]


@pytest.mark.parametrize(("option", "stopped"), [({"tolerance": 1e9}, "tolerance"), ({"budget_ms": 1e-3}, "budget")])
def test_tolerance_and_budget_stop_refinement(client: httpx.Client, option: dict[str, float], stopped: str) -> None:
    refinement = embed(client, {"word": "two"}, refine={"steps": 60, **option})["data"][0]["refinement"]
    assert refinement["stopped"] == stopped
    assert refinement["steps"] < 60
    assert "trace" not in refinement


def test_on_error_partial_leaves_the_valid_items_unchanged(client: httpx.Client) -> None:
    valid = [{"id": "x", "word": "one"}, {"word": "nine"}]
    invalid = [{"photo": "AAAA"}, {"sound": "x"}, {}, 7, {"id": 9.5, "word": "one"}, {"word": "seven!"}]
    body = embed(client, valid[0], *invalid, valid[1], on_error="partial", seed=2, representation="sample")
    # The noise of an item depends on its position, so the valid items are compared at the same positions.
    expected = embed(client, valid[0], *[{"word": "zero"}] * len(invalid), valid[1], seed=2, representation="sample")
    np.testing.assert_allclose(body["data"][0]["embedding"], expected["data"][0]["embedding"], atol=1e-5)
    np.testing.assert_allclose(body["data"][7]["embedding"], expected["data"][7]["embedding"], atol=1e-5)
    assert [d["index"] for d in body["data"]] == list(range(8))
    codes = [d["error"]["code"] for d in body["data"][1:7]]
    assert codes == ["bad_image", "unknown_modality", "empty_subset", "invalid_value", "invalid_value", "bad_text"]
    assert body["usage"]["items"] == 2


def test_on_error_partial_without_a_valid_item_gets_200(client: httpx.Client) -> None:
    body = embed(client, {}, on_error="partial")
    assert body["data"][0]["error"]["status"] == 422
    assert body["usage"]["items"] == 0


@pytest.mark.parametrize("subset", SUBSETS[:-1])
def test_cross_generate_returns_the_absent_modalities(
    client: httpx.Client, values: dict[str, str], subset: tuple[str, ...]
) -> None:
    body = generate(client, select(values, subset))
    generated = body["data"][0]["generated"]
    assert set(generated) == {"digit", "photo", "word"} - set(subset)
    for name, (size, mode) in {"digit": ((28, 28), "L"), "photo": ((32, 32), "RGB")}.items():
        for value in generated.get(name, []):
            image = Image.open(io.BytesIO(base64.b64decode(value["data"])))
            assert (image.format, image.size, image.mode) == ("PNG", size, mode)
            assert (value["media_type"], value["width"], value["height"]) == ("image/png", *size)
    for value in generated.get("word", []):
        assert set(value) == {"text"}
    assert body["usage"]["generated"] == 3 - len(subset)


def test_cross_generate_target_that_is_present_is_reconstructed(
    client: httpx.Client, runtime: Runtime, values: dict[str, str]
) -> None:
    body = generate(
        client, select(values, ("photo",)), targets=["photo"], latent="mean", output={"image": "raw"}, return_embedding=True
    )
    data = body["data"][0]
    raw = data["generated"]["photo"][0]
    expected = runtime.decode("photo", np.array([data["embedding"]], dtype=np.float32))[0]
    assert raw["shape"] == [3, 32, 32]
    np.testing.assert_allclose(unpack(raw["data"]).reshape(3, 32, 32), expected, atol=1e-5)


def test_generated_samples_differ_and_depend_on_the_seed(client: httpx.Client) -> None:
    def sample(**options: Any) -> list[np.ndarray]:
        body = generate(client, {"word": "six"}, targets=["photo"], output={"image": "raw"}, num_samples=3, **options)
        return [unpack(value["data"]) for value in body["data"][0]["generated"]["photo"]]

    first, same_seed, other_seed = sample(seed=1), sample(seed=1), sample(seed=2)
    np.testing.assert_allclose(first, same_seed, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 1e-4
    assert np.abs(first[0] - other_seed[0]).max() > 1e-4
    np.testing.assert_allclose(sample(seed=1, temperature=0.0), sample(latent="mean"), atol=1e-5)


def test_output_image_webp_returns_a_webp_file(client: httpx.Client) -> None:
    value = generate(client, {"word": "six"}, targets=["photo"], output={"image": "webp"})["data"][0]["generated"]["photo"][0]
    assert value["media_type"] == "image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(value["data"]))).format == "WEBP"


def test_on_error_partial_item_with_nothing_to_generate_fails_alone(client: httpx.Client, values: dict[str, str]) -> None:
    body = generate(client, values, {"word": "six"}, on_error="partial")
    assert body["data"][0]["error"]["code"] == "nothing_to_generate"
    assert set(body["data"][1]["generated"]) == {"digit", "photo"}


@pytest.mark.parametrize("path", ["/embed", "/cross-generate"])
def test_form_gets_the_response_of_the_same_json(client: httpx.Client, values: dict[str, str], path: str) -> None:
    options = {"seed": 5, "refine": {"steps": 2, "trace": True}, "encoding_format": "base64"}
    item = {"id": "f", **select(values, ("photo", "word"))}
    expected = _ok(client.post(path, json={"inputs": [item], **options}))
    files = {"photo": ("../../7.png", base64.b64decode(values["photo"]), "image/png")}
    parts = {"id": "f", "word": "seven"}
    query = {"seed": "5", "refine.steps": "2", "refine.trace": "true", "encoding_format": "base64"}
    assert _ok(client.post(path, data=parts, files=files, params=query)) == expected
    with_options = {**parts, "options": orjson.dumps(options).decode()}
    assert _ok(client.post(path, data=with_options, files=files)) == expected
    response = client.post(path, data=with_options, files=files, params={"seed": "9"})
    assert _ok(response) == expected, "the query took precedence over the body"
    base64_field = {"id": "f", "options": with_options["options"], "photo": values["photo"]}
    assert _ok(client.post(path, data=base64_field, files={"word": ("w", b"seven")})) == expected


def test_query_options_apply_to_json_bodies(client: httpx.Client) -> None:
    response = client.post(
        "/cross-generate", json={"inputs": [{"word": "six"}]}, params=[("targets", "digit"), ("targets", "photo")]
    )
    assert set(_ok(response)["data"][0]["generated"]) == {"digit", "photo"}


@pytest.mark.parametrize("name", ["digit", "digits@0", "digits@", "../../etc/passwd", ""])
def test_unknown_model_gets_404(client: httpx.Client, name: str) -> None:
    response = client.post("/embed", json={"model": name, "inputs": [{"word": "one"}]})
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")


def test_model_is_chosen_by_name_or_version(client: httpx.Client, runtime: Runtime) -> None:
    manifest = runtime.bundle.manifest
    for name in ("digits", f"digits@{manifest.version}"):
        body = embed(client, {"word": "one"}, model=name)
        assert (body["model"], body["model_version"]) == ("digits", manifest.version)


def test_server_timing_reports_each_stage(client: httpx.Client) -> None:
    response = client.post("/cross-generate", json={"inputs": [{"word": "one"}], "refine": {"steps": 2}})
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert set(stages) == {"queue", "decode", "features", "encode", "refine", "generate"}
    assert all(float(stages[stage]) > 0 for stage in ("decode", "encode", "refine", "generate"))
    assert math.fsum(map(float, stages.values())) < 1000 * response.elapsed.total_seconds()


def test_passed_deadline_gets_504_while_the_graph_still_runs(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated) as client:
        gated.close(gated.refine_gate)
        slow = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}}
        response = client.post("/embed", json=slow, headers={"X-Request-Timeout-Ms": "15"})
        assert (response.status_code, response.json()["code"]) == (504, "deadline_passed")
        gated.open()
        embed(client, {"word": "one"})


def test_deadline_header_above_the_servers_limit_is_capped(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated, request_timeout_ms=15) as client:
        gated.close(gated.refine_gate)
        slow = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}}
        assert client.post("/embed", json=slow, headers={"X-Request-Timeout-Ms": "60000"}).status_code == 504
        gated.open()


@pytest.mark.parametrize("header", ["", "0", "-1", "1.5", "soon", "\xb2"])
def test_deadline_header_that_is_not_a_positive_integer_gets_422(client: httpx.Client, header: str) -> None:
    headers = {"X-Request-Timeout-Ms": header.encode("latin-1")}
    response = client.post("/embed", json={"inputs": [{"word": "one"}]}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_value")


def test_full_queue_gets_503_with_retry_after(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated, max_queue_items=2, max_items=2) as client, ThreadPoolExecutor(1) as pool:
        engine = client.app.state.registry.choose(None).engine  # type: ignore[attr-defined]
        request = {"inputs": [{"word": "one"}] * 2, "refine": {"steps": 64}}
        gated.close()
        held = pool.submit(client.post, "/embed", json=request)
        gated.wait_until_entered()
        for _ in range(7):
            rejected = client.post("/embed", json=request)
            assert (rejected.status_code, rejected.json()["code"]) == (503, "queue_full")
            assert rejected.json()["retry_after_ms"] > 0
            assert int(rejected.headers["retry-after"]) >= 1
        gated.open()
        assert held.result().status_code == 200
        assert engine.queue_depth == 0
        assert client.post("/embed", json=request).status_code == 200


def test_disconnect_ends_the_jobs_of_the_request(serve: Serve, gated: GatedRuntime) -> None:
    content = orjson.dumps({"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}})
    with serve(gated) as client:
        engine = client.app.state.registry.choose(None).engine  # type: ignore[attr-defined]
        gated.close(gated.refine_gate)
        with connect(client) as connection:
            connection.sendall(head("/embed", len(content)) + content)
            gated.wait_until_entered()
        wait_for(lambda: scrape(client, "concord_rejections_total", reason="client_gone") == 1)
        assert not engine._owners, "jobs of the client are still held"
        gated.open()
