"""Frozen classifier that labels generated sounds with digits. It has one hidden layer and is trained without our models.

As a program it trains the classifier and writes its weights: give the path of ``spoken-digits.parquet``. It hears the four
English training speakers only. It prints its accuracy on clips of theirs that it did not hear (0.99), and on the speaker of the
test rows (0.84).
"""

import sys
from pathlib import Path

import numpy as np

from concord.model import codec
from concord.training.data.augmentation import augment, change_contrast, sample_contrasts, sample_variations
from tests.support.sounds import SOUND

WEIGHTS = Path(__file__).parent.parent / "fixtures" / "sound-classifier.npz"
EPOCHS = 60


def classify(spectrograms: np.ndarray) -> np.ndarray:
    """Predicted digits 0 to 9, (batch,).

    Args:
        spectrograms: (batch, *SOUND.shape) in [0, 1].
    """
    with np.load(WEIGHTS) as weights:
        w1, b1, w2, b2 = (weights[name].astype(np.float32) for name in ("w1", "b1", "w2", "b2"))
    hidden = np.maximum(spectrograms.reshape(len(spectrograms), -1) @ w1 + b1, 0)
    return np.asarray((hidden @ w2 + b2).argmax(axis=1))


def main(file: str) -> None:
    """Train the classifier, write its weights, and print its accuracies."""
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415 - only needed for training

    sounds, labels, splits = _read(file)
    generator = np.random.default_rng(0)
    is_heard = (splits == "train") & (generator.random(len(labels)) < 0.8)
    network = MLPClassifier((48,), alpha=1e-2, batch_size=128, learning_rate_init=2e-3, random_state=0)
    heard, heard_labels = sounds[is_heard], labels[is_heard]
    for _ in range(EPOCHS):
        varied = augment(heard, sample_variations(len(heard), generator, flip=False, shift=2, vertical=False))
        varied = change_contrast(varied, sample_contrasts(len(heard), generator, 0.5))
        network.partial_fit(varied.reshape(len(heard), -1), heard_labels, classes=np.arange(10))
    (w1, w2), (b1, b2) = network.coefs_, network.intercepts_
    np.savez_compressed(WEIGHTS, **{k: v.astype(np.float16) for k, v in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items()})
    for name, rows in {"training speakers": (splits == "train") & ~is_heard, "test speaker": splits == "test"}.items():
        print(f"{name}: {np.mean(classify(sounds[rows]) == labels[rows]):.4f} of {rows.sum()} clips")


def _read(file: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """English clips: spectrograms, digits, and the split."""
    import pyarrow.parquet  # noqa: PLC0415

    rows = [row for row in pyarrow.parquet.read_table(file).to_pylist() if row["language"] == "en"]
    sounds = np.stack([codec.parse_bytes(SOUND, row["audio"]["bytes"]) for row in rows])
    return sounds, np.array([row["label"] for row in rows]), np.array([row["split"] for row in rows])


if __name__ == "__main__":
    main(*sys.argv[1:])
