"""Frozen classifiers that label generated values, trained independently of the models they score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from concord.model import codec
from concord.model.modality import AudioModality, ImageModality, TextModality
from concord.model.vae.networks import image_encoder, initialise
from concord.training.config import Config
from concord.training.data.dataset import Dataset
from concord.training.data.sources import UNKNOWN
from concord.training.errors import DataError
from concord.training.progress import Progress

FEATURES, WIDTH = 64, 16
EPOCHS, BATCH_ROWS, LEARNING_RATE = 3, 128, 1e-3
NO_CLASS = -1
"""Class number of a value that shows none of the classes."""


@runtime_checkable
class FrozenClassifier(Protocol):
    """Classifies values as a decoder returns them (``likelihood.expectation``)."""

    def classify(self, values: Shaped[Tensor, "batch ..."]) -> Int64[Tensor, " batch"]:
        """Return class numbers; ``NO_CLASS`` for values that show no class."""


class ImageClassifier(nn.Module):
    """A small convolutional classifier of images or sounds. ``frechet`` compares the features of its penultimate layer."""

    def __init__(self, modality: ImageModality | AudioModality, classes: int) -> None:
        super().__init__()
        self.trunk = image_encoder(modality, FEATURES, WIDTH)
        self.head = nn.Linear(FEATURES, classes)
        initialise(self.trunk)
        initialise(self.head)

    def features(self, values: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch feature"]:
        """Return the activations of the penultimate layer."""
        features: Tensor = self.trunk(values)
        return features

    def forward(self, values: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Return the logits."""
        logits: Tensor = self.head(self.trunk(values))
        return logits

    def classify(self, values: Float[Tensor, "batch channel height width"]) -> Int64[Tensor, " batch"]:
        return self.forward(values).argmax(1)


class WordClassifier:
    """Returns the class whose name is the text. Padding may precede and follow the name, nothing else."""

    def __init__(self, modality: TextModality, class_names: Sequence[str]) -> None:
        self.modality = modality
        self._classes = {name.lower() if modality.lowercase else name: number for number, name in enumerate(class_names)}

    def classify(self, values: Shaped[Tensor, "batch length ..."]) -> Int64[Tensor, " batch"]:
        texts = [codec.render(self.modality, array)["text"].strip() for array in values.numpy()]
        return torch.tensor([self._classes.get(text, NO_CLASS) for text in texts])


def frozen_classifiers(config: Config, train: Dataset, folder: Path, progress: Progress) -> dict[str, FrozenClassifier]:
    """Return a classifier for each image or audio modality and for each text modality read from the label column, by modality.

    Other modalities have none. Image classifiers are fitted to the training rows and saved in ``folder``. A saved classifier is
    loaded if the data, the number of rows, the modality and the hyperparameters are the same.

    Raises:
        DataError: the classes have no names, or the rows have no labels.
    """
    if not train.class_names or config.data.sources[0].label is None:
        raise DataError(
            "frozen classifiers need labelled classes. Name a label column, and set data.class_names if it holds plain numbers"
        )
    classes = len(train.class_names)
    named = {name for source in config.data.sources for name, column in source.columns.items() if column == source.label}
    classifiers: dict[str, FrozenClassifier] = {}
    for modality in train.modalities:
        if isinstance(modality, ImageModality | AudioModality):
            fingerprint = {
                "modality": modality.model_dump(mode="json"),
                "data": [source.sha256 for source in train.sources],
                "hyperparameters": [FEATURES, WIDTH, EPOCHS, train.steps_per_epoch(BATCH_ROWS), BATCH_ROWS, LEARNING_RATE],
            }
            file = folder / classifier_file(modality)
            classifiers[modality.name] = _load_or_fit(modality, classes, train, file, fingerprint, progress)
        elif isinstance(modality, TextModality) and modality.name in named:
            classifiers[modality.name] = WordClassifier(modality, train.class_names)
    return classifiers


def classifier_file(modality: ImageModality | AudioModality) -> str:
    """Return the name of the file in which an image classifier is saved."""
    return f"classifier-{modality.name}.pt"


def _load_or_fit(
    modality: ImageModality | AudioModality,
    classes: int,
    train: Dataset,
    file: Path,
    fingerprint: Mapping[str, object],
    progress: Progress,
) -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = ImageClassifier(modality, classes).to(train.device)
    if file.exists() and (saved := torch.load(file, map_location="cpu", weights_only=True))["fingerprint"] == fingerprint:
        classifier.load_state_dict(saved["weights"])
    else:
        _fit(classifier, modality.name, train, progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        weights = {name: weight.cpu() for name, weight in classifier.state_dict().items()}
        torch.save({"fingerprint": fingerprint, "weights": weights}, partial)
        partial.replace(file)
    return classifier.eval().requires_grad_(False)


def _fit(classifier: ImageClassifier, name: str, train: Dataset, progress: Progress) -> None:
    steps = train.steps_per_epoch(BATCH_ROWS)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4 * LEARNING_RATE, total_steps=EPOCHS * steps)
    column = [m.name for m in train.modalities].index(name)
    with progress.stage(f"classifier {name}", EPOCHS * steps) as advance:
        for epoch in range(EPOCHS):
            for step, batch in enumerate(train.batches(epoch, BATCH_ROWS, 0)):
                assert batch.labels is not None
                labels = torch.where(batch.present[:, column], batch.labels, UNKNOWN)
                loss = nn.functional.cross_entropy(classifier(batch.arrays[name]), labels, ignore_index=UNKNOWN)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                advance(epoch * steps + step + 1, {"loss": loss.item()})
