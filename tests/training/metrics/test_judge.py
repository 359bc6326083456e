"""Judges learn the drawn digits, are kept, and read words wherever they stand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.modality import TextModality
from training import data
from training.metrics import judge
from training.metrics.judge import ImageJudge, WordJudge, judges
from training.progress import Progress

WORDS = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")


def spoken(*texts: str) -> torch.Tensor:
    """Log-probabilities of decoders that are sure."""
    tokens = torch.stack([torch.tensor([WORDS.alphabet.index(c) for c in text.ljust(8)]) for text in texts])
    return torch.log_softmax(9.0 * torch.nn.functional.one_hot(tokens, 27).float(), dim=-1)


def test_a_word_at_any_offset_and_nothing_else() -> None:
    texts = ["two", "   two", "     two", "one", "twoo", "two two", "", "tw o", "seven", " tow"]
    found = WordJudge(WORDS, ["one", "Two", "seven"]).classify(spoken(*texts))
    assert found.tolist() == [1, 1, 1, 0, -1, -1, -1, -1, 2, -1]


@pytest.fixture(scope="module")
def fitted(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = make_config(photo=True)
    folder = tmp_path_factory.mktemp("judges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "EPOCHS", 40)
        patch.setattr(judge, "BATCH_ROWS", 20)
        train = data.load(settings, "train")
        return settings, train, folder, judges(settings, train, folder, Progress())


def test_there_is_one_for_each_image_and_the_word(fitted: Any) -> None:
    _, train, folder, found = fitted
    assert {name: type(j) for name, j in found.items()} == {"digit": ImageJudge, "photo": ImageJudge, "word": WordJudge}
    batch = next(train.batches(0, 60, 0, shuffle=False))
    for name in ("digit", "photo"):
        assert (found[name].classify(batch.arrays[name]) == batch.labels).float().mean() > 0.9
        assert found[name].features(batch.arrays[name]).shape == (60, judge.FEATURES)
        assert not any(p.requires_grad for p in found[name].parameters())
    assert sorted(f.name for f in folder.iterdir()) == ["judge-digit.pt", "judge-photo.pt"]


def test_judges_are_kept_until_something_changes(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, train, folder, found = fitted
    asked: list[str] = []
    monkeypatch.setattr(judge, "_fit", lambda *arguments: asked.append(arguments[1]))
    monkeypatch.setattr(judge, "EPOCHS", 40)
    monkeypatch.setattr(judge, "BATCH_ROWS", 20)
    again = judges(settings, train, folder, Progress())
    assert asked == []
    for name in ("digit", "photo"):
        assert all(torch.equal(a, b) for a, b in zip(again[name].parameters(), found[name].parameters(), strict=True))  # type: ignore[attr-defined]
    fewer = settings.model_copy(update={"data": settings.data.model_copy(update={"rows_per_epoch": 20})})
    judges(fewer, data.load(fewer, "train"), folder, Progress())
    assert asked == ["digit", "photo"]
    monkeypatch.setattr(judge, "EPOCHS", 41)
    judges(settings, train, folder, Progress())
    assert asked == ["digit", "photo"] * 2


def test_rows_without_classes_cannot_be_judged(fitted: Any, tmp_path: Path) -> None:
    settings, train, _, _ = fitted
    source = settings.data.sources[0].model_copy(update={"label": None})
    bare = settings.model_copy(update={"data": settings.data.model_copy(update={"sources": (source,)})})
    with pytest.raises(data.DataError, match="labelled classes"):
        judges(bare, train, tmp_path, Progress())
