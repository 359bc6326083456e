"""Sounds and their names, from a Parquet file to a service: inferred, trained, served, generated, embedded in bulk."""

import base64
import contextlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from concord.model import bundle, codec
from concord.model.modality import AudioModality
from concord.service.batch.dataset import BatchJob, Embedder, plan
from concord.training.cli import app
from tests.support.server import ROOT, running
from tests.support.sounds import RATE, SEVEN, encode_sound

pytestmark = pytest.mark.slow  # a model is trained

TONES = {"one": 300, "four": 900, "seven": 2000}
"""What is heard of each word: a tone, in Hz."""
SECTION = re.search(r"### Sound\n(.*?)\n## ", (ROOT / "training" / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]
REQUESTS = [line.removeprefix("$ ") for line in SECTION.splitlines() if line.startswith("$ curl")]


def spoken(word: str, generator: np.random.Generator) -> bytes:
    """Return a file of one of three formats: a tone of about half a second in noise."""
    seconds = np.arange(int(RATE * generator.uniform(0.4, 0.6))) / RATE
    tone = np.hanning(len(seconds)) * np.sin(2 * np.pi * TONES[word] * generator.uniform(0.95, 1.05) * seconds)
    samples = generator.uniform(0.1, 0.9) * (tone + 0.01 * generator.normal(size=len(seconds)))
    return encode_sound(samples, ("WAV", "FLAC", "OGG")[generator.integers(3)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the documentation ran. Two rows lack a sound, one has a damaged file."""
    folder = tmp_path_factory.mktemp("spoken")
    generator = np.random.default_rng(0)
    words = [list(TONES)[number % 3] for number in range(180)]
    sounds: list[Any] = [{"bytes": spoken(word, generator), "path": f"{word}.wav"} for word in words]
    sounds[7], sounds[20], sounds[30] = None, None, {"bytes": b"RIFF damaged", "path": "damaged.wav"}
    table = datasets.Dataset.from_dict({"word": words, "sound": sounds})
    table.cast_column("sound", datasets.Audio(decode=False)).to_parquet(folder / "spoken.parquet")
    with contextlib.chdir(folder):
        for command in ("init spoken.parquet", "check spoken.toml", "fit spoken.toml", "export spoken.toml"):
            done = CliRunner().invoke(app, command.split())
            assert done.exit_code == 0, done.output
            if command.startswith("init"):
                changes = {
                    r"epochs = \d+": "epochs = 16",
                    r"# threads = \d+": "threads = 1",
                    r"batch_size = \d+": "batch_size = 16",
                }
                text = Path("spoken.toml").read_text()
                for pattern, replacement in changes.items():
                    text = re.sub(pattern, replacement, text)
                text = text.replace("latent = 32", "width = 8\nfeatures = 32\nhidden = 64\nlatent = 8")
                Path("spoken.toml").write_text(text)
            if command.startswith("check"):
                assert "row 30, column sound: invalid sound: the WAV file is cut short" in done.output.replace("\n", "")
    return folder


@pytest.fixture(scope="module")
def sound(folder: Path) -> AudioModality:
    manifest = bundle.read(folder / "runs" / "spoken" / "bundle").manifest
    assert manifest.format == 5
    (modality,) = [m for m in manifest.modalities if isinstance(m, AudioModality)]
    return modality


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with running(CONCORD_BUNDLE=str(folder / "runs" / "spoken" / "bundle")) as service:
        yield service.client


@pytest.fixture(scope="module")
def templates(sound: AudioModality) -> dict[str, np.ndarray]:
    """The mean spectrogram of each word, of sounds that are in no training row."""
    generator = np.random.default_rng(1)
    return {word: np.mean([codec.parse_bytes(sound, spoken(word, generator)) for _ in range(20)], axis=0) for word in TONES}


def classify(array: np.ndarray, templates: dict[str, np.ndarray]) -> str:
    return min(templates, key=lambda word: float(np.abs(array - templates[word]).sum()))


def test_init_infers_rate_length_and_bands(sound: AudioModality) -> None:
    assert (sound.sample_rate, sound.seconds, sound.mels) == (RATE, 0.6, 32)


def test_classifier_of_this_test_knows_real_sounds(sound: AudioModality, templates: dict[str, np.ndarray]) -> None:
    generator = np.random.default_rng(2)
    for word in [*TONES] * 10:
        assert classify(codec.parse_bytes(sound, spoken(word, generator)), templates) == word


def test_wav_generated_from_a_word_is_that_word(
    client: httpx.Client, sound: AudioModality, templates: dict[str, np.ndarray]
) -> None:
    hits = []
    for word in TONES:
        body = {"inputs": [{"word": word}], "targets": ["sound"], "num_samples": 10, "temperature": 0.5}
        values = client.post("/cross-generate", json=body).json()["data"][0]["generated"]["sound"]
        hits += [classify(codec.parse_bytes(sound, base64.b64decode(v["data"])), templates) == word for v in values]
    assert np.mean(hits) >= 0.9


def test_word_generated_from_a_sound_is_its_word(client: httpx.Client) -> None:
    generator = np.random.default_rng(3)
    words = [*TONES] * 5
    items = [{"sound": base64.b64encode(spoken(word, generator)).decode()} for word in words]
    data = client.post("/cross-generate", json={"inputs": items, "targets": ["word"], "latent": "mean"}).json()["data"]
    assert np.mean([item["generated"]["word"][0]["class"] == word for item, word in zip(data, words, strict=True)]) >= 0.9


def test_bulk_job_over_the_training_file_equals_requests(client: httpx.Client, folder: Path, tmp_path: Path) -> None:
    source = str(folder / "spoken.parquet")
    job = BatchJob(folder / "runs" / "spoken" / "bundle", {"sound": "sound"}, ("sound",))
    parts, _ = plan(job, source, str(tmp_path))
    done = [Embedder(job, source, str(tmp_path)).process(part) for part in parts]
    assert [(one.rows, one.failed) for one in done] == [(180, 3)]
    assert done[0].reason.startswith("bad_audio: sound: the WAV file is cut short")
    rows = pq.read_table(tmp_path).to_pylist()
    items = [{"sound": base64.b64encode(row["sound"]["bytes"]).decode()} for row in rows[:5]]
    data = client.post("/embed", json={"inputs": items}).json()["data"]
    np.testing.assert_allclose([row["embedding"] for row in rows[:5]], [item["embedding"] for item in data], atol=1e-5)
    assert rows[0]["generated_sound"]["bytes"][:4] == b"RIFF"


def test_requests_of_the_documentation_run_as_they_stand(client: httpx.Client) -> None:
    """Their sound is a person's; the model of this test knows tones only, so the response is checked, not its meaning."""
    address = f"{client.base_url.host}:{client.base_url.port}"
    assert SEVEN.name in REQUESTS[0]
    responses = [
        json.loads(subprocess.check_output(shlex.split(line.replace("localhost:8000", address)), cwd=ROOT)) for line in REQUESTS
    ]
    embedded, generated = responses
    assert embedded["data"][0]["modalities"] == ["sound"]
    (value,) = generated["data"][0]["generated"]["sound"]
    assert (value["media_type"], value["sample_rate"]) == ("audio/wav", RATE)
