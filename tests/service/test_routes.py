import base64
import contextlib
import io
import itertools
import math
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image

from model import codec
from model.modality import collate
from model.runtime import Runtime

SUBSETS = [s for size in (1, 2, 3) for s in itertools.combinations(("digit", "photo", "word"), size)]

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


def embed(client: httpx.Client, *inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return _ok(client.post("/embed", json={"inputs": list(inputs), **options}))


def generate(client: httpx.Client, *inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return _ok(client.post("/cross-generate", json={"inputs": list(inputs), **options}))


def _ok(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def pick(values: dict[str, str], subset: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in subset}


def vector(packed: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), dtype="<f4")


def test_mixed_subsets_in_one_request_each_get_the_runtimes_posterior(
    client: httpx.Client, runtime: Runtime, values: dict[str, str]
) -> None:
    answer = embed(client, *(pick(values, s) for s in SUBSETS), representation="mean_log_var")
    for data, subset in zip(answer["data"], SUBSETS, strict=True):
        row = {m.name: codec.decode(m, values[m.name]) for m in runtime.modalities if m.name in subset}
        posterior = runtime.encode(*collate(runtime.modalities, [row]))
        np.testing.assert_allclose(data["embedding"], posterior.mean[0], atol=1e-5)
        np.testing.assert_allclose(data["log_var"], posterior.log_var[0], atol=1e-5)
        assert data["modalities"] == list(subset)
    assert answer["dimensions"] == runtime.latent
    assert answer["usage"] == {"items": 7, "images": 8, "text_characters": 20, "refine_steps": 0}


def test_ids_come_back_and_null_is_absence(client: httpx.Client) -> None:
    answer = embed(client, {"id": "a/é", "word": "two", "photo": None}, {"word": "two"})
    assert [(d["id"], d["index"], d["modalities"]) for d in answer["data"]] == [("a/é", 0, ["word"]), (None, 1, ["word"])]


def test_base64_holds_the_same_numbers(client: httpx.Client) -> None:
    numbers = embed(client, {"word": "two"}, representation="mean_log_var")["data"][0]
    packed = embed(client, {"word": "two"}, representation="mean_log_var", encoding_format="base64")["data"][0]
    np.testing.assert_allclose(vector(packed["embedding"]), numbers["embedding"], rtol=1e-6)
    np.testing.assert_allclose(vector(packed["log_var"]), numbers["log_var"], rtol=1e-6)


def test_normalize_keeps_the_direction(client: httpx.Client) -> None:
    plain = np.array(embed(client, {"word": "two"})["data"][0]["embedding"])
    unit = np.array(embed(client, {"word": "two"}, normalize=True)["data"][0]["embedding"])
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), atol=1e-6)


def test_the_seed_alone_decides_a_sample(client: httpx.Client) -> None:
    def draw(seed: int) -> list[float]:
        return embed(client, {"word": "two"}, representation="sample", seed=seed)["data"][0]["embedding"]

    assert draw(3) == pytest.approx(draw(3), abs=1e-5)
    assert np.abs(np.subtract(draw(3), draw(4))).max() > 1e-2
    twins = embed(client, {"word": "two"}, {"word": "two"}, representation="sample", seed=3)["data"]
    assert np.abs(np.subtract(twins[0]["embedding"], twins[1]["embedding"])).max() > 1e-2, "items draw apart"
    assert np.abs(np.subtract(draw(3), embed(client, {"word": "two"})["data"][0]["embedding"])).max() > 1e-2


@pytest.mark.parametrize(("subset", "objective"), [(("digit",), "observed"), (("digit", "photo", "word"), "elbo")])
def test_refinement_tells_what_it_did(
    client: httpx.Client, values: dict[str, str], subset: tuple[str, ...], objective: str
) -> None:
    answer = embed(client, pick(values, subset), refine={"steps": 4, "trace": True})
    told = answer["data"][0]["refinement"]
    assert (told["steps"], told["stopped"], told["objective"]) == (4, "steps", objective)
    assert told["after"] >= told["before"]
    assert len(told["trace"]) == 5
    assert told["trace"][0] == told["before"]
    assert answer["usage"]["refine_steps"] == 4
    assert answer["data"][0]["embedding"] != embed(client, pick(values, subset))["data"][0]["embedding"]


def test_tolerance_and_budget_stop_refinement(client: httpx.Client) -> None:
    for option, stopped in (({"tolerance": 1e9}, "tolerance"), ({"budget_ms": 1e-3}, "budget")):
        told = embed(client, {"word": "two"}, refine={"steps": 60, **option})["data"][0]["refinement"]
        assert told["stopped"] == stopped
        assert told["steps"] < 60
        assert "trace" not in told


def test_with_partial_a_bad_item_leaves_its_neighbours_as_they_were(client: httpx.Client) -> None:
    good = [{"id": "x", "word": "one"}, {"word": "nine"}]
    bad = [{"photo": "AAAA"}, {"sound": "x"}, {}, 7, {"id": 9, "word": "one"}, {"word": "seven!"}]
    mixed = embed(client, good[0], *bad, good[1], on_error="partial", seed=2, representation="sample")
    # the noise of an item depends on its place, so the good ones are compared in the same places
    alone = embed(client, good[0], *[{"word": "zero"}] * len(bad), good[1], seed=2, representation="sample")
    np.testing.assert_allclose(mixed["data"][0]["embedding"], alone["data"][0]["embedding"], atol=1e-5)
    np.testing.assert_allclose(mixed["data"][7]["embedding"], alone["data"][7]["embedding"], atol=1e-5)
    assert [d["index"] for d in mixed["data"]] == list(range(8))
    codes = [d["error"]["code"] for d in mixed["data"][1:7]]
    assert codes == ["bad_image", "unknown_modality", "empty_subset", "invalid_value", "invalid_value", "bad_text"]
    assert mixed["usage"]["items"] == 2


def test_partial_answers_even_if_no_item_is_good(client: httpx.Client) -> None:
    answer = embed(client, {}, on_error="partial")
    assert answer["data"][0]["error"]["status"] == 422
    assert answer["usage"]["items"] == 0


@pytest.mark.parametrize("subset", SUBSETS[:-1])
def test_what_is_lacking_is_generated(client: httpx.Client, values: dict[str, str], subset: tuple[str, ...]) -> None:
    answer = generate(client, pick(values, subset))
    generated = answer["data"][0]["generated"]
    assert set(generated) == {"digit", "photo", "word"} - set(subset)
    for name, (size, mode) in {"digit": ((28, 28), "L"), "photo": ((32, 32), "RGB")}.items():
        for value in generated.get(name, []):
            image = Image.open(io.BytesIO(base64.b64decode(value["data"])))
            assert (image.format, image.size, image.mode) == ("PNG", size, mode)
            assert (value["media_type"], value["width"], value["height"]) == ("image/png", *size)
    for value in generated.get("word", []):
        assert set(value) == {"text"}
    assert answer["usage"]["generated"] == 3 - len(subset)


def test_a_named_target_that_is_present_is_reconstructed(
    client: httpx.Client, runtime: Runtime, values: dict[str, str]
) -> None:
    answer = generate(
        client, pick(values, ("photo",)), targets=["photo"], latent="mean", output={"image": "raw"}, return_embedding=True
    )
    data = answer["data"][0]
    raw = data["generated"]["photo"][0]
    expected = runtime.decode("photo", np.array([data["embedding"]], dtype=np.float32))[0]
    assert raw["shape"] == [3, 32, 32]
    np.testing.assert_allclose(vector(raw["data"]).reshape(3, 32, 32), expected, atol=1e-5)


def test_samples_differ_and_depend_on_the_seed_alone(client: httpx.Client) -> None:
    def draw(**options: Any) -> list[np.ndarray]:
        answer = generate(client, {"word": "six"}, targets=["photo"], output={"image": "raw"}, num_samples=3, **options)
        return [vector(value["data"]) for value in answer["data"][0]["generated"]["photo"]]

    first, again, other, cold, mean = (
        draw(seed=1),
        draw(seed=1),
        draw(seed=2),
        draw(seed=1, temperature=0.0),
        draw(latent="mean"),
    )
    np.testing.assert_allclose(first, again, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 1e-4
    assert np.abs(first[0] - other[0]).max() > 1e-4
    np.testing.assert_allclose(cold, mean, atol=1e-5)


def test_webp_is_webp(client: httpx.Client) -> None:
    value = generate(client, {"word": "six"}, targets=["photo"], output={"image": "webp"})["data"][0]["generated"]["photo"][0]
    assert value["media_type"] == "image/webp"
    assert Image.open(io.BytesIO(base64.b64decode(value["data"]))).format == "WEBP"


def test_with_partial_an_item_with_nothing_to_generate_fails_alone(client: httpx.Client, values: dict[str, str]) -> None:
    answer = generate(client, values, {"word": "six"}, on_error="partial")
    assert answer["data"][0]["error"]["code"] == "nothing_to_generate"
    assert set(answer["data"][1]["generated"]) == {"digit", "photo"}


@pytest.mark.parametrize("path", ["/embed", "/cross-generate"])
def test_a_form_gets_the_answer_of_the_same_json(client: httpx.Client, values: dict[str, str], path: str) -> None:
    options = {"seed": 5, "refine": {"steps": 2, "trace": True}, "encoding_format": "base64"}
    item = {"id": "f", **pick(values, ("photo", "word"))}
    expected = _ok(client.post(path, json={"inputs": [item], **options}))
    files = {"photo": ("../../7.png", base64.b64decode(values["photo"]), "image/png")}
    parts = {"id": "f", "word": "seven"}
    query = {"seed": "5", "refine.steps": "2", "refine.trace": "true", "encoding_format": "base64"}
    assert _ok(client.post(path, data=parts, files=files, params=query)) == expected
    told = {**parts, "options": orjson.dumps(options).decode()}
    assert _ok(client.post(path, data=told, files=files)) == expected
    assert _ok(client.post(path, data=told, files=files, params={"seed": "9"})) == expected, "the body overrules the query"
    base64_field = {"id": "f", "options": told["options"], "photo": values["photo"]}
    assert _ok(client.post(path, data=base64_field, files={"word": ("w", b"seven")})) == expected


def test_options_in_the_query_go_with_json_too(client: httpx.Client) -> None:
    response = client.post(
        "/cross-generate", json={"inputs": [{"word": "six"}]}, params=[("targets", "digit"), ("targets", "photo")]
    )
    assert set(_ok(response)["data"][0]["generated"]) == {"digit", "photo"}


@pytest.mark.parametrize("name", ["digit", "digits@0", "digits@", "../../etc/passwd", ""])
def test_an_unknown_model(client: httpx.Client, name: str) -> None:
    response = client.post("/embed", json={"model": name, "inputs": [{"word": "one"}]})
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")


def test_the_model_by_name_and_by_version(client: httpx.Client, runtime: Runtime) -> None:
    manifest = runtime.bundle.manifest
    for name in ("digits", f"digits@{manifest.version}"):
        answer = embed(client, {"word": "one"}, model=name)
        assert (answer["model"], answer["model_version"]) == ("digits", manifest.version)


def test_server_timing_tells_each_stage(client: httpx.Client) -> None:
    response = client.post("/cross-generate", json={"inputs": [{"word": "one"}], "refine": {"steps": 2}})
    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert set(stages) == {"queue", "decode", "encode", "refine", "generate"}
    assert all(float(stages[stage]) > 0 for stage in ("decode", "encode", "refine", "generate"))
    assert math.fsum(map(float, stages.values())) < 1000 * response.elapsed.total_seconds()


def test_a_deadline_that_passes(client: httpx.Client) -> None:
    long = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}}
    response = client.post("/embed", json=long, headers={"X-Request-Timeout-Ms": "15"})
    assert (response.status_code, response.json()["code"]) == (504, "deadline_passed")
    assert response.elapsed.total_seconds() < 0.5
    embed(client, {"word": "one"})


def test_the_server_caps_the_deadline(serve: Serve) -> None:
    with serve(request_timeout_ms=15) as client:
        long = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}}
        assert client.post("/embed", json=long, headers={"X-Request-Timeout-Ms": "60000"}).status_code == 504


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "soon", "\xb2"])
def test_a_deadline_that_is_no_number(client: httpx.Client, asked: str) -> None:
    headers = {"X-Request-Timeout-Ms": asked.encode("latin-1")}
    response = client.post("/embed", json={"inputs": [{"word": "one"}]}, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_value")


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    with serve(max_queue_items=2, max_items=2) as client:
        engine = client.app.state.bundles.choose(None).engine  # type: ignore[attr-defined]
        busy = {"inputs": [{"word": "one"}] * 2, "refine": {"steps": 64}}
        with ThreadPoolExecutor(8) as pool:
            answers = [f.result() for f in [pool.submit(client.post, "/embed", json=busy) for _ in range(8)]]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert refused[0].json()["code"] == "queue_full"
        assert refused[0].json()["retry_after_ms"] > 0
        assert int(refused[0].headers["retry-after"]) >= 1
        assert engine.queue_depth == 0


def test_work_for_a_client_that_left_ends(client: httpx.Client) -> None:
    content = orjson.dumps({"inputs": [{"word": "one"}] * 32, "refine": {"steps": 64}})
    head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)

    def gone() -> float:
        found = re.search(r'concord_rejections_total\{reason="client_gone"\} (\S+)', client.get("/metrics").text)
        return float(found[1]) if found else 0.0

    before = gone()  # other tests' clients leave too
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head + content)
        time.sleep(0.05)
    deadline = time.monotonic() + 5
    while gone() == before:
        assert time.monotonic() < deadline, "the work went on"
        time.sleep(0.01)
