"""The built-in bundle ``digits-sound``: size, published figures, a person's voice, sounds generated from words."""

import base64
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from concord.model import bundle, codec
from concord.model.runtime import Runtime
from concord.training.reports.tables import results_table
from tests.support import sound_classifier
from tests.support.server import ROOT, running
from tests.support.sounds import SEVEN, SOUND

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin(bundle.SOUND_BUNDLE), threads=1)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running("--bundle", bundle.SOUND_BUNDLE) as service:
        yield service.client


def generate(client: httpx.Client, item: dict[str, str], target: str, **options: object) -> list[dict[str, str]]:
    response = client.post("/cross-generate", json={"inputs": [item], "targets": [target], **options})
    assert response.status_code == 200, response.text
    values: list[dict[str, str]] = response.json()["data"][0]["generated"][target]
    return values


def hear(values: list[dict[str, str]]) -> list[int]:
    """Classes that the frozen classifier hears in WAV files of a response."""
    files = [base64.b64decode(value["data"]) for value in values]
    assert all(file.startswith(b"RIFF") for file in files)
    return sound_classifier.classify(np.stack([codec.parse_bytes(SOUND, file) for file in files])).tolist()


def test_digits_sound_bundle_replays_golden_examples_and_is_small(runtime: Runtime) -> None:
    assert runtime.replay_golden() <= 1e-3
    assert sum(entry.bytes for entry in runtime.bundle.manifest.files.values()) <= 12e6


def test_digits_sound_bundle_has_the_spectrogram_of_the_classifier(runtime: Runtime) -> None:
    (sound,) = [m for m in runtime.modalities if m.name == "sound"]
    assert sound == SOUND


def test_digits_sound_bundle_metrics_equal_published_results(runtime: Runtime) -> None:
    manifest = runtime.bundle.manifest
    assert results_table(manifest) in (ROOT / "training" / "results" / "digits.md").read_text(encoding="utf-8")
    assert any("CC BY-SA 4.0 (Free Spoken Digit Dataset)" in source.licence for source in manifest.provenance.data)


def test_digits_sound_classifier_knows_a_person_s_voice() -> None:
    assert sound_classifier.classify(codec.parse_bytes(SOUND, SEVEN.read_bytes())[np.newaxis]) == [7]


def test_wav_generated_from_a_word_is_called_by_its_name(client: httpx.Client) -> None:
    heard = [hear(generate(client, {"word": word}, "sound", num_samples=8, seed=0)) for word in WORDS]
    assert np.mean(np.array(heard) == np.arange(10)[:, np.newaxis]) >= 0.9
    likeliest = [hear(generate(client, {"word": word}, "sound", latent="mean")) for word in WORDS]
    assert likeliest == [[digit] for digit in range(10)]


def test_person_s_seven_gives_its_word(client: httpx.Client) -> None:
    voice = base64.b64encode(SEVEN.read_bytes()).decode()
    assert generate(client, {"sound": voice}, "word", latent="mean") == [{"text": "seven"}]
