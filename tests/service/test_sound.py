"""A bundle with sound over HTTP: every form of a request, bad files next to good ones, generated WAV, the client."""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from concord.client import Client, InvalidRequestError, Sound
from concord.model import codec
from concord.model.codec import audio
from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.modality import TextModality
from concord.model.runtime import Runtime
from tests.service.conftest import validate_response
from tests.support.graphs import write_bundle
from tests.support.sounds import RATE, SEVEN, SOUND, encode_sound, speech, unusual_sounds

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
FILES = unusual_sounds()


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def spoken(tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = tmp_path_factory.mktemp("sound") / "spoken"
    return Runtime(write_bundle(path, (WORD, SOUND), {**tiny_facts, "name": "spoken"}), threads=1)


@pytest.fixture(scope="module")
def client(serve: Serve, spoken: Runtime) -> Iterator[httpx.Client]:
    with serve(spoken) as client:
        yield client


def embed(client: httpx.Client, sound: Any) -> httpx.Response:
    return client.post("/embed", json={"inputs": [{"sound": sound}]})


def embedding(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    found: list[float] = response.json()["data"][0]["embedding"]
    return found


def test_every_form_of_a_request_has_the_same_embedding(client: httpx.Client) -> None:
    data = to_base64(SEVEN.read_bytes())
    expected = embedding(embed(client, data))
    assert np.abs(expected).max() > 0
    for sound in (f"data:audio/flac;base64,{data}", {"data": data}, {"data": data, "media_type": "audio/flac; rate=8000"}):
        assert embedding(embed(client, sound)) == expected
    assert embedding(client.post("/embed", files={"sound": SEVEN.read_bytes()})) == expected
    assert embedding(client.post("/embed", files={"sound": (None, data)})) == expected
    response = client.post("/v1/embeddings", json={"input": [{"sound": data}], "encoding_format": "float"})
    assert response.json()["data"][0]["embedding"] == expected


@pytest.mark.parametrize("name", [name for name, (content, _) in FILES.items() if content])
def test_unusual_file_gets_a_clear_answer_and_its_neighbours_are_untouched(client: httpx.Client, name: str) -> None:
    content, code = FILES[name]
    good = to_base64(SEVEN.read_bytes())
    items = [{"sound": good}, {"sound": to_base64(content)}, {"sound": good}]
    response = client.post("/embed", json={"inputs": items, "on_error": "partial"})
    first, second, third = response.json()["data"]
    assert first["embedding"] == third["embedding"] == embedding(embed(client, good))
    if code is None:
        assert np.isfinite(second["embedding"]).all()
        return
    (fault,) = second["error"]["errors"]
    assert fault["pointer"] == "/inputs/1/sound"
    assert fault["code"] == code
    alone = embed(client, to_base64(content))
    assert alone.status_code == {"bad_audio": 400, "too_large": 413, "unsupported_media_type": 415}[code]


def test_media_type_of_another_kind_is_rejected(client: httpx.Client) -> None:
    for media_type in ("image/png", "video/mp4"):
        response = embed(client, {"data": to_base64(SEVEN.read_bytes()), "media_type": media_type})
        assert response.status_code == 415
        assert "audio/flac" in response.json()["errors"][0]["detail"]


def test_longest_clip_is_a_setting(serve: Serve, spoken: Runtime) -> None:
    clip = to_base64(encode_sound(np.tile(speech(), 3), "FLAC"))
    with serve(spoken, max_audio_seconds=2) as client:
        assert embed(client, clip).status_code == 413
        assert client.get("/v1/models").json()["data"][0]["limits"]["max_audio_seconds"] == 2
    with serve(spoken, max_audio_seconds=3) as client:
        assert embed(client, clip).status_code == 200


def test_generated_sound_is_a_wav_of_its_spectrogram(client: httpx.Client) -> None:
    body = {"inputs": [{"word": "seven"}], "targets": ["sound"], "num_samples": 2, "seed": 5, "output": {"spectrogram": True}}
    response = client.post("/cross-generate", json=body)
    values = response.json()["data"][0]["generated"]["sound"]
    assert client.post("/cross-generate", json=body).json()["data"][0]["generated"]["sound"] == values
    assert len(values) == 2
    for value in values:
        assert (value["media_type"], value["sample_rate"], value["seconds"]) == ("audio/wav", RATE, 1.0)
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(value["data"])), dtype="float32")
        assert (rate, samples.shape) == (RATE, (RATE,))
        shown = np.frombuffer(base64.b64decode(value["spectrogram"]["data"]), "<f4").reshape(SOUND.shape)
        np.testing.assert_allclose(samples, audio.samples_from_array(SOUND, shown, 5), atol=1e-4)
    raw = client.post("/cross-generate", json={**body, "output": {"audio": "raw"}}).json()["data"][0]["generated"]["sound"]
    assert raw == [value["spectrogram"] for value in values]
    plain = client.post("/cross-generate", json={**body, "output": {}}).json()["data"][0]["generated"]["sound"]
    assert all("spectrogram" not in value for value in plain)


def test_openapi_describes_sound(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    sound = described["components"]["schemas"]["Input"]["properties"]["sound"]
    assert "WAV, FLAC, OGG or MP3" in json.dumps(sound)
    part = described["paths"]["/embed"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert part["schema"]["properties"]["sound"]["format"] == "binary"
    assert "audio/flac" in part["encoding"]["sound"]["contentType"]
    example = described["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["examples"]["one"]["value"]
    response = client.post("/embed", json=example)
    assert response.status_code == 200
    validate_response(described, response)
    codec.parse(SOUND, example["inputs"][0]["sound"])


class TestClient:
    @pytest.fixture
    def connected(self, client: httpx.Client) -> Iterator[Client]:
        with Client(str(client.base_url)) as connected:
            yield connected

    def test_path_bytes_and_samples_are_the_same_sound(self, connected: Client) -> None:
        samples, rate = soundfile.read(SEVEN, dtype="float32")
        forms = [SEVEN, SEVEN.read_bytes(), (samples, rate), {"array": samples, "sampling_rate": rate}]
        forms += [{"bytes": SEVEN.read_bytes(), "path": None}, soundfile.read(SEVEN, dtype="int16")]
        forms += [(np.stack([samples, samples], axis=1), rate), (samples.astype(np.float64), np.int64(rate))]
        matrix = connected.embed([{"sound": form} for form in forms]).matrix
        np.testing.assert_allclose(matrix, np.tile(matrix[:1], (len(forms), 1)), atol=1e-5)

    @pytest.mark.parametrize("samples", [np.zeros((2, 8)), np.zeros(0), np.zeros(8, np.uint8), np.array([0.0, np.nan])])
    def test_array_that_is_no_sound_is_rejected_with_its_place(self, connected: Client, samples: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"/inputs/0/sound: received samples of shape .* a sound has the shape"):
            connected.embed({"sound": (samples, RATE)})

    def test_silence_raises_the_service_s_error(self, connected: Client) -> None:
        with pytest.raises(InvalidRequestError, match="silent"):
            connected.embed({"sound": (np.zeros(RATE), RATE)})

    def test_generated_sound_has_samples_and_spectrogram(self, connected: Client, tmp_path: Path) -> None:
        response = connected.cross_generate({"word": "seven"}, targets=["sound"], spectrogram=True)
        (sound,) = response.results[0].generated["sound"]
        assert isinstance(sound, Sound)
        assert (sound.sample_rate, sound.samples.shape) == (RATE, (RATE,))
        assert sound.spectrogram is not None
        assert sound.spectrogram.shape == SOUND.shape
        sound.save(tmp_path / "seven.wav")
        array = audio.array_from_file(SOUND, (tmp_path / "seven.wav").read_bytes(), DEFAULT_LIMITS)
        assert np.isfinite(array).all()
        (raw,) = connected.cross_generate({"word": "seven"}, targets=["sound"], audio="raw").results[0].generated["sound"]
        np.testing.assert_array_equal(np.asarray(raw), sound.spectrogram)
