"""Frozen digit classifier that labels generated images. It has one hidden layer and is trained on MNIST, without our models.

As a program it trains the classifier and writes its weights: give the path of ``mnist-train.parquet``, and optionally that of
``mnist-test.parquet`` to print the test accuracy (97%).
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WEIGHTS = Path(__file__).parent.parent / "fixtures" / "digit-classifier.npz"


def classify(pictures: np.ndarray) -> np.ndarray:
    """Predicted digits 0 to 9, (batch,).

    Args:
        pictures: grey images (batch, 28, 28) in [0, 1].
    """
    with np.load(WEIGHTS) as weights:
        w1, b1, w2, b2 = (weights[name].astype(np.float32) for name in ("w1", "b1", "w2", "b2"))
    hidden = np.maximum(pictures.reshape(len(pictures), -1) @ w1 + b1, 0)
    return np.asarray((hidden @ w2 + b2).argmax(axis=1))


def main(train: str, *tests: str) -> None:
    """Train the classifier, write its weights, and print the accuracy on each file of ``tests``."""
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415 - only needed for training

    pictures, labels = _read(train)
    network = MLPClassifier((64,), alpha=1e-3, batch_size=256, max_iter=12, early_stopping=True, random_state=0)
    network.fit(pictures.reshape(len(pictures), -1), labels)
    (w1, w2), (b1, b2) = network.coefs_, network.intercepts_
    np.savez_compressed(WEIGHTS, **{k: v.astype(np.float16) for k, v in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items()})
    for test in tests:
        pictures, labels = _read(test)
        print(f"{test}: {np.mean(classify(pictures) == labels):.4f}")


def _read(file: str) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet  # noqa: PLC0415

    rows = pyarrow.parquet.read_table(file, columns=["image", "label"]).to_pylist()
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])), dtype=np.float32) / 255 for row in rows]
    return np.stack(pictures), np.array([row["label"] for row in rows])


if __name__ == "__main__":
    main(*sys.argv[1:])
