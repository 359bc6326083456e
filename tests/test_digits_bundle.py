"""What the built-in bundle promises of itself, asked of the bundle itself."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from model import bundle, codec
from model.runtime import Posterior, Runtime
from tests.judge import classify
from tests.readme import ROOT
from training.scores import coherence

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLES = 64


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)


def encode(runtime: Runtime, **values: object) -> Posterior:
    row = {m.name: codec.decode(m, values[m.name]) for m in runtime.modalities if m.name in values}
    inputs = {m.name: row.get(m.name, np.zeros(m.shape, m.dtype))[np.newaxis] for m in runtime.modalities}
    return runtime.encode(inputs, np.array([[m.name in row for m in runtime.modalities]]))


def test_figures_are_no_worse_than_published(runtime: Runtime) -> None:
    """A retrained bundle may raise these. Where it trades one for another the changelog says so."""
    metrics = runtime.bundle.manifest.metrics
    probe = metrics["probe"]
    assert probe["digit"] >= 0.975
    assert probe["photo"] >= 0.95
    assert probe["word"] >= 0.99
    assert min(value for name, value in probe.items() if name.count("+") == 1) >= 0.99
    assert metrics["refinement"]["raised"] >= 0.98
    assert coherence(metrics, several=False) >= 0.95
    assert coherence(metrics, several=True) >= 0.975
    distances = [d for source, found in metrics["frechet"].items() if source != "prior" for d in found.values()]
    assert np.mean(distances) <= 20


def test_size_stays_fit_for_git(runtime: Runtime) -> None:
    assert sum(entry.bytes for entry in runtime.bundle.manifest.files.values()) <= 21e6


@pytest.mark.parametrize("digit", range(10))
def test_a_word_gives_its_digit(runtime: Runtime, digit: int) -> None:
    posterior = encode(runtime, word=WORDS[digit])
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [digit]


def test_samples_of_a_word_mostly_give_its_digit(runtime: Runtime) -> None:
    """Samples are the weak spot of Gaussian posteriors, between two modes lies no digit."""
    noise = np.random.default_rng(0).standard_normal((SAMPLES, runtime.latent), dtype=np.float32)
    right = []
    for digit, word in enumerate(WORDS):
        posterior = encode(runtime, word=word)
        z = runtime.draw(Posterior(*(np.repeat(part, SAMPLES, axis=0) for part in (posterior.mean, posterior.log_var))), noise)
        right.append(np.mean(classify(runtime.decode("digit", z)[:, 0]) == digit))
    assert np.mean(right) >= 0.8


def test_a_picture_gives_its_word(runtime: Runtime) -> None:
    word = next(m for m in runtime.modalities if m.name == "word")
    picture = base64.b64encode((ROOT / "tests/fixtures/digit-7.png").read_bytes()).decode()
    told = runtime.decode("word", encode(runtime, digit=picture).mean)
    assert codec.encode(word, told[0]) == {"text": "seven"}


def test_a_drawing_gives_its_digit(runtime: Runtime) -> None:
    """One that is in no data set."""
    drawing = base64.b64encode((ROOT / "tests/fixtures/digit-7.png").read_bytes()).decode()
    posterior = encode(runtime, digit=drawing)
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [7]


def test_a_photo_and_its_word_give_its_digit(runtime: Runtime) -> None:
    """Alone this photo is hard to read: it is taken for a two or a three."""
    photo = base64.b64encode((ROOT / "tests/fixtures/photo-7.png").read_bytes()).decode()
    posterior = encode(runtime, photo=photo, word="seven")
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [7]


def test_the_judge_reads_the_fixture() -> None:
    picture = Image.open(io.BytesIO((ROOT / "tests/fixtures/digit-7.png").read_bytes()))
    assert classify(np.asarray(picture, dtype=np.float32)[np.newaxis] / 255) == [7]
