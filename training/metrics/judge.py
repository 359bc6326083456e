"""Judges: who says which class a generated value shows. Frozen, and strangers to every model that they judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from model import codec
from model.modality import ImageModality, TextModality
from model.vae.networks import encoder, initialise
from training.config import Config
from training.data import Dataset
from training.progress import Progress
from training.sources import UNKNOWN, DataError

FEATURES, WIDTH = 64, 16
EPOCHS, BATCH_ROWS, LEARNING_RATE = 3, 128, 1e-3
REFUSED = -1  # no class


@runtime_checkable
class Judge(Protocol):
    """Tells the class of each value that a decoder expects (``likelihood.expectation``)."""

    def classify(self, values: Shaped[Tensor, "batch ..."]) -> Int64[Tensor, " batch"]:
        """Class numbers; -1 for what shows none."""


class ImageJudge(nn.Module):
    """A small convolutional classifier; what comes before its last layer are the features that ``frechet`` compares."""

    def __init__(self, modality: ImageModality, classes: int) -> None:
        super().__init__()
        self.trunk = encoder(modality, FEATURES, WIDTH)
        self.head = nn.Linear(FEATURES, classes)
        initialise(self.trunk)
        initialise(self.head)

    def features(self, values: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch feature"]:
        """The penultimate layer."""
        found: Tensor = self.trunk(values)
        return found

    def forward(self, values: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Logits."""
        found: Tensor = self.head(self.trunk(values))
        return found

    def classify(self, values: Float[Tensor, "batch channel height width"]) -> Int64[Tensor, " batch"]:
        return self.forward(values).argmax(1)


class WordJudge:
    """The class whose name is the text, at any place in it: nothing but padding may stand around."""

    def __init__(self, modality: TextModality, class_names: Sequence[str]) -> None:
        self.modality = modality
        self._classes = {name.lower() if modality.lowercase else name: number for number, name in enumerate(class_names)}

    def classify(self, values: Float[Tensor, "batch length token"]) -> Int64[Tensor, " batch"]:
        texts = [codec.encode(self.modality, array)["text"].strip() for array in values.numpy()]
        return torch.tensor([self._classes.get(text, REFUSED) for text in texts])


def judges(config: Config, train: Dataset, folder: Path, progress: Progress) -> dict[str, Judge]:
    """A judge for every image, and for every text that is read from the label column; by modality. Others have none.

    Image judges are fitted to the training rows and kept in ``folder``; there they are read again while data, number of rows,
    modality and code of the judge are the same.

    Raises:
        DataError: the classes have no names, or the rows no labels.
    """
    if not train.class_names or config.data.sources[0].label is None:
        raise DataError("judges need labelled classes: name a label column, and data.class_names if it holds plain numbers")
    classes = len(train.class_names)
    named = {name for source in config.data.sources for name, column in source.columns.items() if column == source.label}
    found: dict[str, Judge] = {}
    for modality in train.modalities:
        if isinstance(modality, ImageModality):
            told = {
                "modality": modality.model_dump(mode="json"),
                "data": [source.sha256 for source in train.sources],
                "fitted": [FEATURES, WIDTH, EPOCHS, train.steps_per_epoch(BATCH_ROWS), BATCH_ROWS, LEARNING_RATE],
            }
            found[modality.name] = _image_judge(modality, classes, train, folder / f"judge-{modality.name}.pt", told, progress)
        elif isinstance(modality, TextModality) and modality.name in named:
            found[modality.name] = WordJudge(modality, train.class_names)
    return found


def _image_judge(
    modality: ImageModality, classes: int, train: Dataset, file: Path, told: Mapping[str, object], progress: Progress
) -> ImageJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = ImageJudge(modality, classes)
    if file.exists() and (saved := torch.load(file, weights_only=True))["told"] == told:
        judge.load_state_dict(saved["weights"])
    else:
        _fit(judge, modality.name, train, progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save({"told": told, "weights": judge.state_dict()}, partial)
        partial.replace(file)
    return judge.eval().requires_grad_(False)


def _fit(judge: ImageJudge, name: str, train: Dataset, progress: Progress) -> None:
    steps = train.steps_per_epoch(BATCH_ROWS)
    optimizer = torch.optim.Adam(judge.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4 * LEARNING_RATE, total_steps=EPOCHS * steps)
    column = [m.name for m in train.modalities].index(name)
    with progress.stage(f"judge {name}", EPOCHS * steps) as advance:
        for epoch in range(EPOCHS):
            for step, batch in enumerate(train.batches(epoch, BATCH_ROWS, 0)):
                assert batch.labels is not None
                labels = torch.where(batch.present[:, column], batch.labels, UNKNOWN)
                loss = nn.functional.cross_entropy(judge(batch.arrays[name]), labels, ignore_index=UNKNOWN)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                advance(epoch * steps + step + 1, {"loss": loss.item()})
