"""Frozen classifiers: fitted to the generated digits, saved and loaded; words at any offset."""

from pathlib import Path
from typing import Any

import pytest
import torch

from concord.model.modality import TextModality
from concord.training.data import dataset
from concord.training.errors import DataError
from concord.training.evaluation.metrics import frozen_classifier
from concord.training.evaluation.metrics.frozen_classifier import ImageClassifier, WordClassifier, frozen_classifiers
from concord.training.progress import Progress

WORDS = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")


def decoded(*texts: str) -> torch.Tensor:
    """Return log-probabilities that are concentrated on the characters of the texts."""
    tokens = torch.stack([torch.tensor([WORDS.alphabet.index(c) for c in text.ljust(8)]) for text in texts])
    return torch.log_softmax(9.0 * torch.nn.functional.one_hot(tokens, 27).float(), dim=-1)


def test_word_classifier_accepts_a_class_name_at_any_offset_only() -> None:
    texts = ["two", "   two", "     two", "one", "twoo", "two two", "", "tw o", "seven", " tow"]
    classes = WordClassifier(WORDS, ["one", "Two", "seven"]).classify(decoded(*texts))
    assert classes.tolist() == [1, 1, 1, 0, -1, -1, -1, -1, 2, -1]


@pytest.fixture(scope="module")
def fitted(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = make_config(photo=True)
    folder = tmp_path_factory.mktemp("classifiers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_classifier, "EPOCHS", 40)
        patch.setattr(frozen_classifier, "BATCH_ROWS", 20)
        train = dataset.load(settings, "train")
        return settings, train, folder, frozen_classifiers(settings, train, folder, Progress())


def test_frozen_classifiers_cover_images_and_the_label_word(fitted: Any) -> None:
    _, train, folder, classifiers = fitted
    assert {name: type(classifier) for name, classifier in classifiers.items()} == {
        "digit": ImageClassifier,
        "photo": ImageClassifier,
        "word": WordClassifier,
    }
    batch = next(train.batches(0, 60, 0, shuffle=False))
    for name in ("digit", "photo"):
        assert (classifiers[name].classify(batch.arrays[name]) == batch.labels).float().mean() > 0.9
        assert classifiers[name].features(batch.arrays[name]).shape == (60, frozen_classifier.FEATURES)
        assert not any(p.requires_grad for p in classifiers[name].parameters())
    assert sorted(f.name for f in folder.iterdir()) == ["classifier-digit.pt", "classifier-photo.pt"]


def test_frozen_classifiers_are_fitted_again_only_after_a_change(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, train, folder, classifiers = fitted
    fits: list[str] = []
    monkeypatch.setattr(frozen_classifier, "_fit", lambda *arguments: fits.append(arguments[1]))
    monkeypatch.setattr(frozen_classifier, "EPOCHS", 40)
    monkeypatch.setattr(frozen_classifier, "BATCH_ROWS", 20)
    loaded = frozen_classifiers(settings, train, folder, Progress())
    assert fits == []
    for name in ("digit", "photo"):
        assert all(torch.equal(a, b) for a, b in zip(loaded[name].parameters(), classifiers[name].parameters(), strict=True))  # type: ignore[attr-defined]
    fewer = settings.model_copy(update={"data": settings.data.model_copy(update={"rows_per_epoch": 20})})
    frozen_classifiers(fewer, dataset.load(fewer, "train"), folder, Progress())
    assert fits == ["digit", "photo"]
    monkeypatch.setattr(frozen_classifier, "EPOCHS", 41)
    frozen_classifiers(settings, train, folder, Progress())
    assert fits == ["digit", "photo"] * 2


def test_frozen_classifiers_without_label_column_are_rejected(fitted: Any, tmp_path: Path) -> None:
    settings, train, _, _ = fitted
    source = settings.data.sources[0].model_copy(update={"label": None})
    unlabelled = settings.model_copy(update={"data": settings.data.model_copy(update={"sources": (source,)})})
    with pytest.raises(DataError, match="labelled classes"):
        frozen_classifiers(unlabelled, train, tmp_path, Progress())


@pytest.mark.parametrize("likelihood", ["categorical", "autoregressive"])
def test_word_classifier_reads_what_the_decoder_returns(likelihood: Any) -> None:
    modality = TextModality(name="word", length=4, alphabet=" abc", likelihood=likelihood)
    tokens = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [2, 2, 0, 0]])
    values = tokens if likelihood == "autoregressive" else torch.nn.functional.one_hot(tokens, 4).float()
    assert WordClassifier(modality, ["c", "ab"]).classify(values).tolist() == [1, 0, frozen_classifier.NO_CLASS]
