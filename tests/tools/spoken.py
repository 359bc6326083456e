"""Measures the built-in bundle ``digits-sound`` over HTTP: ``python -m tests.tools.spoken FOLDER``. Prints JSON.

Unlike ``tests.tools.served``, it sends the files of the rows, so real voices, and hears the WAV files that come back. The
frozen classifiers are those of ``tests.support``: they were trained without our models, and have not heard the speaker of the
test rows. FOLDER has the Parquet files that the configuration names.
"""

import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from concord.client import Client
from concord.model import codec
from concord.model.bundle import SOUND_BUNDLE
from concord.training.evaluation.metrics.probe import balanced_points, linear_probe
from tests.support import digit_classifier, sound_classifier
from tests.support.server import running
from tests.support.sounds import SOUND, encode_sound, speech

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POINTS, ITEMS, REPEATS = 500, 32, 300

Rows = tuple[list[Any], np.ndarray]
"""Values of one modality and the digit that each one shows."""


def main(folder: Path) -> None:
    train, test = read(folder, "train"), read(folder, "test")
    with running("--bundle", SOUND_BUNDLE) as service, Client(f"http://{service.address}") as client:
        figures = {
            "probe of the sound": probe(client, train["sound"], test["sound"]),
            "accuracy of the sound classifier": accuracy(sounds(test["sound"][0]), test["sound"][1]),
            **coherence(client, test),
        }
    print(json.dumps({**figures, "decoding, ms": decoding()}, indent=1))


def read(folder: Path, split: str) -> dict[str, Rows]:
    """Values of each modality: files of all clips of the split, and of as many pictures."""
    chosen = [("language", "=", "en"), ("split", "=", split)]
    clips = pq.read_table(folder / "spoken-digits.parquet", filters=chosen).to_pylist()
    rows: dict[str, Rows] = {"sound": ([row["audio"]["bytes"] for row in clips], np.array([row["label"] for row in clips]))}
    for name, file in {"digit": "mnist", "photo": "mnist-m"}.items():
        table = pq.read_table(folder / f"{file}-{split}.parquet", columns=["image", "label"]).slice(0, len(clips)).to_pylist()
        rows[name] = [row["image"]["bytes"] for row in table], np.array([row["label"] for row in table])
    return {**rows, "word": ([WORDS[n % 10] for n in range(len(clips))], np.arange(len(clips)) % 10)}


def requests(modality: str, values: Sequence[Any]) -> Iterator[list[dict[str, Any]]]:
    items = [{modality: value} for value in values]
    return (items[start : start + ITEMS] for start in range(0, len(items), ITEMS))


def probe(client: Client, train: Rows, test: Rows) -> float:
    chosen = balanced_points(train[1], POINTS, 0)
    train_means, test_means = (
        np.concatenate([client.embed(items).matrix for items in requests("sound", values)])
        for values in ([train[0][row] for row in chosen], test[0])
    )
    return linear_probe(train_means, train[1][chosen], test_means, test[1])


def coherence(client: Client, test: dict[str, Rows]) -> dict[str, float]:
    """Share of generated values, one sample for each row, that show the digit of their source."""
    figures = {}
    for source, (values, labels) in test.items():
        targets = [target for target in ("digit", "word", "sound") if target != source and "sound" in (source, target)]
        generated: dict[str, list[Any]] = {target: [] for target in targets}
        for seed, items in enumerate(requests(source, values)):
            for result in client.cross_generate(items, targets=targets, seed=seed).results:
                for target in targets:
                    generated[target].append(result.generated[target][0])
        for target in targets:
            figures[f"{source} -> {target}"] = accuracy(generated[target], labels)
    return figures


def sounds(files: Sequence[bytes]) -> list[Any]:
    return [soundfile.read(io.BytesIO(file), dtype="float32")[0] for file in files]


def accuracy(values: Sequence[Any], labels: np.ndarray) -> float:
    """Share of pictures, words or sounds that show their digit."""
    if isinstance(values[0], str):
        return float(np.mean([value == WORDS[label] for value, label in zip(values, labels, strict=True)]))
    if isinstance(values[0], Image.Image):
        shown = digit_classifier.classify(np.stack([np.asarray(value, np.float32) / 255 for value in values]))
        return float(np.mean(shown == labels))
    waves = [encode_sound(getattr(value, "samples", value)) for value in values]
    heard = sound_classifier.classify(np.stack([codec.parse_bytes(SOUND, wave) for wave in waves]))
    return float(np.mean(heard == labels))


def decoding() -> dict[str, float]:
    """Median milliseconds from a file of one second to its array, by format."""
    samples, found = speech(), {}
    resampled = np.repeat(samples, 6)  # 48 kHz
    files = {name: encode_sound(samples, name) for name in ("WAV", "FLAC", "OGG", "MP3")}
    for name, file in {**files, "WAV of 48 kHz": encode_sound(resampled, rate=48_000)}.items():
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            codec.parse_bytes(SOUND, file)
            times.append(1000 * (time.perf_counter() - start))
        found[name] = round(float(np.median(times)), 2)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
