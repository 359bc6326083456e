"""Every training stage with autoregressive texts, some of them absent."""

import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from concord.model.codec.text import text_from_tokens
from concord.model.modality import TextModality, VectorModality
from concord.model.vae.generative import context_name, target_name
from concord.model.vae.multimodal import MultimodalVAE
from concord.training import config
from concord.training.concord import Concord
from concord.training.data import dataset
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.objectives import refine
from concord.training.trainable import Stage

ROWS = 8
STAGES = ("joint", "refiner", "contrast", "align", "refresh", "flow")


@pytest.fixture
def vae(sentence_modalities: Any, make_vae: Any) -> Concord:
    return make_vae(sentence_modalities, couplings=2).requires_grad_(True)


@pytest.fixture
def stages(vae: Concord, make_config: Any) -> dict[str, Stage]:
    settings = make_config(
        contrast={"epochs": 1}, refresh={"epochs": 1}, flow={"epochs": 1, "couplings": 2}, align={"contrast_weight": 1.0}
    )
    assert isinstance(settings, config.Config)
    return {stage.name: stage for stage in vae.stages(settings)}


@pytest.fixture
def batch(sentence_rows: Any) -> Batch:
    present = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    present[:, 0] |= ~present.any(1)
    assert not present[:, 1].all()
    return Batch({name: array[:ROWS] for name, array in sentence_rows.items()}, present, None)


@pytest.mark.parametrize("name", STAGES)
def test_loss_ignores_absent_texts_and_trains_their_decoder(
    vae: Concord, stages: dict[str, Stage], batch: Batch, name: str
) -> None:
    loss, figures = stages[name](batch, Noise(0, ROWS))
    assert loss.isfinite()
    assert all(figure.isfinite() for figure in figures.values())
    arrays = dict(batch.arrays)
    for index, text in ((1, "caption"), (2, "code")):
        arrays[text] = torch.where(batch.present[:, index : index + 1], arrays[text], 10**6)
    again, _ = stages[name](Batch(arrays, batch.present, None), Noise(0, ROWS))
    torch.testing.assert_close(again, loss)
    gradients = torch.autograd.grad(loss, list(vae.decoders["caption"].parameters()), allow_unused=True)
    is_trained = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert is_trained == (name in ("joint", "refiner", "align"))


def test_word_dropout_hides_words_from_the_decoder_only(vae: Concord, batch: Batch) -> None:
    caption = batch.arrays["caption"]
    hidden = torch.full_like(caption, vae.modalities[1].categories)
    z = torch.randn(ROWS, 1, vae.latent, generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(batch.present)

    def log_likelihood(seen: torch.Tensor) -> torch.Tensor:
        arrays = {**batch.arrays, context_name("caption"): seen}
        return vae.weighted_log_likelihood(arrays, every, z)[:, 0]

    torch.testing.assert_close(log_likelihood(caption), vae.weighted_log_likelihood(batch.arrays, every, z)[:, 0])
    difference = (log_likelihood(hidden) - log_likelihood(caption)).abs()
    has_several = (caption != 0).sum(1) > 1
    assert (difference[has_several] > 1e-4).all()
    # Hidden words are predicted too: the first word of a text does not depend on any.
    first = torch.where(torch.arange(7) > 0, hidden, caption)
    network: Any = vae.decoders["caption"]
    terms = [network.token_log_likelihoods(z[:, 0], caption, seen) for seen in (caption, first, hidden)]
    torch.testing.assert_close(terms[0][:, 0], terms[2][:, 0])
    torch.testing.assert_close(terms[0][:, 1], terms[1][:, 1])
    posteriors = [vae.joint({**batch.arrays, context_name("caption"): seen}, every).mean for seen in (caption, hidden)]
    assert torch.equal(*posteriors)


def write_captions(file: Path, captions: list[str] | list[list[str]]) -> None:
    """Write rows of a number and a caption, or several."""
    numbers = datasets.List(datasets.Value("float32"))
    text = datasets.Value("string") if isinstance(captions[0], str) else datasets.List(datasets.Value("string"))
    features = datasets.Features({"vector": numbers, "caption": text})
    rows = {"vector": [[float(row)] for row in range(len(captions))], "caption": captions}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def settings_of(folder: Path, caption: TextModality, **data: Any) -> config.Config:
    columns = {"vector": "vector", "caption": "caption"}
    source = config.Source(train="rows.parquet", held_out=0.1, columns=columns, licence="none")
    return config.Config(
        name="tiny",
        modalities=(VectorModality(name="vector", size=1), caption),
        data=config.Data(folder=folder, pairing="row", sources=(source,), **data),
    )


def test_word_dropout_hides_the_share_of_words_in_training_batches_only(tmp_path: Path) -> None:
    write_captions(tmp_path / "rows.parquet", [f"a red bird number {row}" for row in range(200)])
    caption = TextModality(name="caption", length=6, unit="word", likelihood="autoregressive")
    settings = settings_of(tmp_path, caption, word_dropout={"caption": 0.3})
    train = dataset.load(settings, "train")
    (first,), (again,), (other,) = (list(train.batches(epoch, 180, 0)) for epoch in (0, 0, 1))
    seen, tokens = first.arrays[context_name("caption")], first.arrays["caption"]
    hidden = seen == train.modalities[1].categories
    assert abs(hidden.float().mean() - 0.3) < 0.05
    assert torch.equal(seen[~hidden], tokens[~hidden])
    assert torch.equal(again.arrays[context_name("caption")], seen)
    assert not torch.equal(other.arrays[context_name("caption")] == train.modalities[1].categories, hidden)
    resumed = next(train.batches(0, 60, 0, start=2))
    assert torch.equal(
        resumed.arrays[context_name("caption")], list(train.batches(0, 60, 0))[2].arrays[context_name("caption")]
    )
    for batch in (*train.batches(0, 60, 0, shuffle=False), *dataset.load(settings, "test").batches(0, 20, 0)):
        assert context_name("caption") not in batch.arrays
    with pytest.raises(
        ValueError, match=r"word_dropout names \['vector'\], the autoregressive text modalities are \['caption'\]"
    ):
        config.Config.model_validate(
            {**settings.model_dump(), "data": {**settings.data.model_dump(), "word_dropout": {"vector": 0.3}}}
        )
    with pytest.raises(ValueError, match=r"random_offset names \['caption'\], the texts that can be shifted are \[\]"):
        config.Config.model_validate(
            {**settings.model_dump(), "data": {**settings.data.model_dump(), "random_offset": ("caption",)}}
        )


def test_other_texts_are_predicted_from_the_text_that_is_read(tmp_path: Path) -> None:
    """Row r has r % 3 + 1 captions: of r % 9, and of "a", "b" or "c"."""
    captions = [[f"{row % 9} {row % 9} {letter}" for letter in "abc"[: row % 3 + 1]] for row in range(36)]
    write_captions(tmp_path / "rows.parquet", captions)
    caption = TextModality(name="caption", length=6, unit="word", likelihood="autoregressive")
    settings = settings_of(tmp_path, caption, other_texts=("caption",), word_dropout={"caption": 0.3})
    train = dataset.load(settings, "train")
    learned = train.modalities[1]
    assert isinstance(learned, TextModality)
    pairs = set()
    for epoch in range(30):
        (batch,) = train.batches(epoch, len(train), 0)
        tokens, target = batch.arrays["caption"], batch.arrays[target_name("caption")]
        seen = batch.arrays[context_name("caption")]
        hidden = seen == learned.categories
        assert torch.equal(seen[~hidden], target[~hidden])
        assert hidden.any()
        for read, predicted in zip(tokens.numpy(), target.numpy(), strict=True):
            one, other = (text_from_tokens(learned, text).split() for text in (read, predicted))
            assert one[1] == other[1], "of the same row"
            assert (one[2] == other[2]) == (int(one[1]) % 3 == 0), "another one, if there is one"
            pairs.add((one[2], other[2]))
    assert pairs == {("a", "a"), *itertools.permutations("abc", 2)}
    resumed = next(train.batches(0, 9, 0, start=1)).arrays[target_name("caption")]
    assert torch.equal(resumed, list(train.batches(0, 9, 0))[1].arrays[target_name("caption")])
    for batch in (*train.batches(0, 9, 0, shuffle=False), *dataset.load(settings, "test").batches(0, 9, 0)):
        assert target_name("caption") not in batch.arrays
    with pytest.raises(ValueError, match=r"data\.other_texts names \['vector'\], the autoregressive text modalities are"):
        config.Config.model_validate(
            {**settings.model_dump(), "data": {**settings.data.model_dump(), "other_texts": ("vector",)}}
        )


def test_decoder_predicts_the_target_and_refinement_the_given_text(sentence_vae: MultimodalVAE, sentence_rows: Any) -> None:
    vae, every = sentence_vae, torch.ones(14, 3, dtype=torch.bool)
    target = sentence_rows["caption"].flip(0)
    arrays = {**sentence_rows, target_name("caption"): target, context_name("caption"): target}
    z = torch.randn(14, 1, vae.latent, generator=torch.Generator().manual_seed(0))
    predicted = vae.weighted_log_likelihood(arrays, every, z)
    torch.testing.assert_close(predicted, vae.weighted_log_likelihood({**sentence_rows, "caption": target}, every, z))
    assert (predicted != vae.weighted_log_likelihood(sentence_rows, every, z)).any()
    start = vae.joint(arrays, every)
    torch.testing.assert_close(start.mean, vae.joint(sentence_rows, every).mean)
    noise = torch.randn(14, 2, vae.latent, generator=torch.Generator().manual_seed(1))
    refined, expected = (refine(vae, Batch(a, every, None), start, noise, 2).posterior for a in (arrays, sentence_rows))
    torch.testing.assert_close(refined.mean, expected.mean)


def test_subwords_are_learned_from_the_training_rows(tmp_path: Path) -> None:
    write_captions(tmp_path / "rows.parquet", [f"a reddish bird number {row}" for row in range(60)])
    caption = TextModality(name="caption", length=20, unit="subword", likelihood="autoregressive")
    train = dataset.load(settings_of(tmp_path, caption, max_vocabulary=290), "train")
    learned = train.modalities[1]
    assert isinstance(learned, TextModality)
    assert learned.merges
    assert 256 < learned.categories <= 291
    texts = {text_from_tokens(learned, tokens) for tokens in train.columns["caption"].values}
    assert "a reddish bird number 7" in texts or "a reddish bird number 8" in texts
    assert all(text.startswith("a reddish bird number ") for text in texts)
