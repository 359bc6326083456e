"""The built-in bundle ``digits``: size, published metrics, coherence of generated values."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from concord.model import bundle, codec
from concord.model.runtime import Posterior, Runtime
from concord.training.reports.summary import mean_coherence
from tests.support.digit_classifier import classify
from tests.support.server import ROOT

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLES = 64


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime.load(bundle.builtin(bundle.DEFAULT_BUNDLE), threads=1)


def encode(runtime: Runtime, **values: object) -> Posterior:
    row = {m.name: codec.parse(m, values[m.name]) for m in runtime.modalities if m.name in values}
    inputs = {m.name: row.get(m.name, np.zeros(m.shape, m.dtype))[np.newaxis] for m in runtime.modalities}
    return runtime.encode(inputs, np.array([[m.name in row for m in runtime.modalities]]))


def test_digits_bundle_metrics_are_at_least_the_published_ones(runtime: Runtime) -> None:
    """A retrained bundle may raise these limits. If it lowers one for another, the changelog must say so."""
    metrics = runtime.bundle.manifest.metrics
    probe = metrics["probe"]
    assert probe["digit"] >= 0.985
    assert probe["photo"] >= 0.96
    assert probe["word"] >= 0.99
    assert probe["digit+photo"] >= 0.995
    assert min(value for name, value in probe.items() if name.count("+") == 1) >= 0.985
    assert metrics["refinement"]["raised"] >= 0.98
    assert mean_coherence(metrics, multimodal=False) >= 0.97
    assert mean_coherence(metrics, multimodal=True) >= 0.975
    distances = [d for source, targets in metrics["frechet"].items() if source != "prior" for d in targets.values()]
    assert np.mean(distances) <= 20


def test_digits_bundle_is_at_most_21_mb(runtime: Runtime) -> None:
    assert sum(entry.bytes for entry in runtime.bundle.manifest.files.values()) <= 21e6


@pytest.mark.parametrize("digit", range(10))
def test_digits_bundle_word_gives_its_digit(runtime: Runtime, digit: int) -> None:
    posterior = encode(runtime, word=WORDS[digit])
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [digit]


def test_digits_bundle_samples_of_a_word_mostly_give_its_digit(runtime: Runtime) -> None:
    """Samples are harder than posterior means: between two modes of the posterior there is no digit."""
    noise = np.random.default_rng(0).standard_normal((SAMPLES, runtime.latent), dtype=np.float32)
    accuracies = []
    for digit, word in enumerate(WORDS):
        posterior = encode(runtime, word=word)
        z = runtime.sample(
            Posterior(*(np.repeat(array, SAMPLES, axis=0) for array in (posterior.mean, posterior.log_var))), noise
        )
        accuracies.append(np.mean(classify(runtime.decode("digit", z)[:, 0]) == digit))
    assert np.mean(accuracies) >= 0.8


def test_digits_bundle_image_gives_its_word(runtime: Runtime) -> None:
    word = next(m for m in runtime.modalities if m.name == "word")
    picture = base64.b64encode((ROOT / "tests/fixtures/digit-7.png").read_bytes()).decode()
    log_probabilities = runtime.decode("word", encode(runtime, digit=picture).mean)
    assert codec.render(word, log_probabilities[0]) == {"text": "seven"}


def test_digits_bundle_hand_drawn_image_gives_its_digit(runtime: Runtime) -> None:
    """The drawing is in no data set."""
    drawing = base64.b64encode((ROOT / "tests/fixtures/digit-7.png").read_bytes()).decode()
    posterior = encode(runtime, digit=drawing)
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [7]


def test_digits_bundle_photo_with_its_word_gives_its_digit(runtime: Runtime) -> None:
    """The photo without the word is ambiguous: the model reads a two or a three."""
    photo = base64.b64encode((ROOT / "tests/fixtures/photo-7.png").read_bytes()).decode()
    posterior = encode(runtime, photo=photo, word="seven")
    assert classify(runtime.decode("digit", posterior.mean)[:, 0]) == [7]


def test_digit_classifier_recognises_the_drawing() -> None:
    picture = Image.open(io.BytesIO((ROOT / "tests/fixtures/digit-7.png").read_bytes()))
    assert classify(np.asarray(picture, dtype=np.float32)[np.newaxis] / 255) == [7]
