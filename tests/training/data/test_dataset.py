import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from concord.model import codec
from concord.model.modality import EncodedModality, ImageModality, TextModality, VectorModality
from concord.training import config_file
from concord.training.config import Config, Data, Objective, Source
from concord.training.data import dataset
from concord.training.errors import DataError
from tests.support.encoders import write_image_encoder, write_text_encoder
from tests.support.images import encode_image

FIRST = VectorModality(name="first", size=2, mean=(0.0, 0.0), std=(1.0, 1.0))
SECOND = VectorModality(name="second", size=2, mean=(0.0, 0.0), std=(1.0, 1.0))
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
CLASSES = ["zero", "one", "two"]


def write(file: Path, labels: list[int], names: list[str] | None = CLASSES) -> None:
    """Write rows whose vector is (label, row number)."""
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"numbers": datasets.List(datasets.Value("float32")), "label": feature})
    rows = {"numbers": [[float(label), float(row)] for row, label in enumerate(labels)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def paired(**changes: Any) -> Config:
    sources = (
        Source(
            train="first.parquet",
            test="first.parquet",
            columns={"first": "numbers", "word": "label"},
            label="label",
            licence="CC0",
        ),
        Source(train="second.parquet", test="second.parquet", columns={"second": "numbers"}, label="label", licence="CC0"),
    )
    data = Data(**{"pairing": "class", "sources": sources, "random_offset": ("word",), **changes})
    return Config(name="paired", modalities=(SECOND, WORD, FIRST), data=data)  # in another order than the sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired")
    write(folder / "first.parquet", [0, 1, 2] * 7)
    write(folder / "second.parquet", [2] * 3 + [0] * 5 + [1] * 40)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> dataset.Dataset:
    return dataset.load(paired(), "train", folder)


def equal(one: dataset.Batch, other: dataset.Batch) -> bool:
    assert [field.name for field in fields(dataset.Batch)] == ["arrays", "present", "labels"]
    assert one.labels is not None
    assert other.labels is not None
    arrays_equal = [torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays]
    return all(arrays_equal) and torch.equal(one.present, other.present) and torch.equal(one.labels, other.labels)


def column(batches: Iterator[dataset.Batch], name: str, index: int = 1) -> list[int]:
    return [int(value) for batch in batches for value in batch.arrays[name][:, index]]


def text(tokens: torch.Tensor) -> str:
    return "".join(WORD.alphabet[int(token)] for token in tokens)


def test_class_pairing_joins_rows_of_the_same_class(rows: dataset.Dataset) -> None:
    for epoch, shuffle in itertools.product(range(3), (True, False)):
        for batch in rows.batches(epoch, 4, seed=0, shuffle=shuffle):
            assert batch.labels is not None
            assert torch.equal(batch.arrays["first"][:, 0].long(), batch.labels)
            assert torch.equal(batch.arrays["second"][:, 0].long(), batch.labels)
            assert [text(tokens).strip() for tokens in batch.arrays["word"]] == [CLASSES[label] for label in batch.labels]
            assert batch.present.shape == (len(batch.labels), 3)
            assert batch.present.all()


def test_epoch_contains_every_anchor_row_once_in_random_order(rows: dataset.Dataset) -> None:
    epochs = [column(rows.batches(epoch, 7, seed=0), "first") for epoch in range(3)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert column(rows.batches(0, 7, seed=1), "first") != epochs[0]
    assert column(rows.batches(0, 4, seed=0, shuffle=False), "first") == list(range(21))


def test_paired_rows_are_sampled_uniformly_each_epoch(rows: dataset.Dataset) -> None:
    epochs = [column(rows.batches(epoch, 21, seed=0, shuffle=False), "second") for epoch in range(300)]
    assert len({tuple(epoch) for epoch in epochs}) == 300
    counts = np.bincount(np.concatenate(epochs), minlength=48)
    for start, size in ((0, 3), (3, 5), (8, 40)):  # rows of each class in second.parquet
        expected = 7 * 300 / size
        assert np.all(np.abs(counts[start : start + size] - expected) < 5 * np.sqrt(expected))


def test_batches_without_shuffle_are_reproducible(rows: dataset.Dataset, folder: Path) -> None:
    again = dataset.load(paired(), "test", folder)
    pairs = zip(rows.batches(0, 4, 0, shuffle=False), again.batches(0, 4, 0, shuffle=False), strict=True)
    assert all(equal(*pair) for pair in pairs)


@given(
    start=st.integers(0, 12),
    size=st.integers(1, 25),
    epoch=st.integers(0, 99),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_batches_from_start_equal_the_rest_of_the_epoch(
    *, rows: dataset.Dataset, start: int, size: int, epoch: int, seed: int, shuffle: bool
) -> None:
    full = list(rows.batches(epoch, size, seed, shuffle=shuffle))
    resumed = list(rows.batches(epoch, size, seed, start, shuffle=shuffle))
    assert len(full) == rows.steps_per_epoch(size, shuffle=shuffle)
    assert len(resumed) == max(0, len(full) - start)
    assert all(equal(*pair) for pair in zip(full[start:], resumed, strict=True))


@pytest.mark.parametrize(
    ("size", "shuffle", "sizes"),
    [
        (8, True, [8, 8]),
        (8, False, [8, 8, 5]),
        (7, True, [7, 7, 7]),
        (7, False, [7, 7, 7]),
        (30, True, [21]),
        (30, False, [21]),
    ],
)
def test_batches_drop_last_batch_only_with_shuffle(rows: dataset.Dataset, size: int, shuffle: bool, sizes: list[int]) -> None:
    assert [len(batch.present) for batch in rows.batches(0, size, 0, shuffle=shuffle)] == sizes
    assert rows.steps_per_epoch(size, shuffle=shuffle) == len(sizes)


def test_steps_per_epoch_batch_size_zero_is_rejected(rows: dataset.Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, received 0"):
        rows.steps_per_epoch(0)


def test_rows_per_epoch_limits_training_epochs_only(folder: Path) -> None:
    short = dataset.load(paired(rows_per_epoch=10), "train", folder)
    epochs = [column(short.batches(epoch, 5, seed=0), "first") for epoch in range(40)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert set(itertools.chain(*epochs)) == set(range(21))
    assert len(column(short.batches(0, 30, seed=0), "first")) == 10
    assert len(column(short.batches(0, 5, seed=0, shuffle=False), "first")) == 21
    assert len(column(dataset.load(paired(rows_per_epoch=10), "test", folder).batches(0, 3, seed=0), "first")) == 21


def test_rows_per_epoch_above_row_count_is_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match=r"first\.parquet: data\.rows_per_epoch is 22, but the file has 21 rows"):
        dataset.load(paired(rows_per_epoch=22), "train", folder)


def test_random_offset_moves_texts_within_their_padding(rows: dataset.Dataset) -> None:
    offsets: dict[str, set[int]] = {word: set() for word in CLASSES}
    for epoch in range(60):
        for batch in rows.batches(epoch, 21, seed=0):
            for tokens in batch.arrays["word"]:
                shown = text(tokens)
                offsets[shown.strip()].add(len(shown) - len(shown.lstrip()))
    assert offsets == {"zero": set(range(5)), "one": set(range(6)), "two": set(range(6))}


def test_texts_without_random_offset_start_at_the_first_position(folder: Path) -> None:
    for batch in dataset.load(paired(random_offset=()), "train", folder).batches(0, 21, seed=0):
        assert all(text(tokens)[0] != " " for tokens in batch.arrays["word"])


def by_row(folder: Path, columns: dict[str, list[Any]], *, label: str | None = None) -> dataset.Dataset:
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    source = Source(
        train="rows.parquet",
        test="rows.parquet",
        columns={"first": "one", "second": "two", "word": "text"},
        label=label,
        licence="CC0",
    )
    return dataset.load(
        Config(
            name="rows",
            modalities=(FIRST, SECOND, WORD),
            data=Data(pairing="row", sources=(source,), random_offset=("word",)),
        ),
        "train",
        folder,
    )


def test_row_pairing_keeps_rows_together_and_nulls_absent(tmp_path: Path) -> None:
    one = [[1.0, 0.0], None, [3.0, 0.0], None]
    two = [[1.0, 1.0], [2.0, 1.0], None, None]
    word = [None, "b", "c", "d"]
    rows = by_row(tmp_path, {"one": one, "two": two, "text": word, "kind": [3, None, 5, 6]}, label="kind")
    (batch,) = rows.batches(0, 4, 0, shuffle=False)
    assert batch.present.tolist() == [[True, True, False], [False, True, True], [True, False, True], [False, False, True]]
    assert batch.arrays["first"].tolist() == [[1, 0], [0, 0], [3, 0], [0, 0]]
    assert batch.arrays["second"].tolist() == [[1, 1], [2, 1], [0, 0], [0, 0]]
    assert batch.arrays["word"][0].tolist() == [0] * 8
    assert [text(tokens).strip() for tokens in batch.arrays["word"]] == ["", "b", "c", "d"]
    assert batch.labels is not None
    assert batch.labels.tolist() == [3, -1, 5, 6]
    for shuffled in rows.batches(5, 2, 0):
        for first, second, present in zip(shuffled.arrays["first"], shuffled.arrays["second"], shuffled.present, strict=True):
            assert not (present[0] and present[1]) or first[0] == second[0]


def incomplete(folder: Path, rows: Literal["all", "complete"], *, two: list[Any] | None = None) -> Config:
    """Eight rows whose first vector is their number. Odd rows have no second vector, and only they have the word b."""
    second = two or [[0.0, 9.0], None, [2.0, 9.0], None, [4.0, 9.0], None, [6.0, 9.0], None]
    columns = {
        "one": [[float(row), 0.0] for row in range(8)],
        "two": second,
        "text": ["a", "b"] * 4,
        "split": ["train"] * 6 + ["test"] * 2,
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "incomplete.parquet")
    names = {"first": "one", "second": "two", "word": "text"}
    source = Source(train="incomplete.parquet", split="split", columns=names, licence="CC0")
    word = TextModality(name="word", length=8, unit="word")
    return Config(name="rows", modalities=(FIRST, SECOND, word), data=Data(pairing="row", sources=(source,), rows=rows))


def test_sample_is_the_same_choice_of_rows_in_file_order(rows: dataset.Dataset) -> None:
    every = rows._rows.tolist()
    chosen = rows.sample(7)._rows.tolist()
    assert chosen == rows.sample(7)._rows.tolist() == sorted(chosen)
    assert len(set(chosen)) == 7
    assert chosen != every[:7]
    assert rows.sample(len(rows) + 1)._rows.tolist() == every


def test_with_pairs_keeps_rows_with_at_least_two_modalities(tmp_path: Path) -> None:
    two, text = [None, [1.0, 9.0], None, None], ["a", None, None, "d"]
    rows = by_row(tmp_path, {"one": [[float(row), 0.0] for row in range(4)], "two": two, "text": text})
    pairs = rows.with_pairs()
    assert (len(rows), len(pairs), pairs.steps_per_epoch(2)) == (4, 3, 1)
    assert column(pairs.batches(0, 2, 0, shuffle=False), "first", 0) == [0, 1, 3]
    assert sorted(column(pairs.batches(3, 3, 1), "first", 0)) == [0, 1, 3]
    assert pairs.subsets() == {("first", "word"): 2, ("first", "second"): 1}


def test_with_pairs_limits_rows_per_epoch_to_its_rows(tmp_path: Path) -> None:
    run = incomplete(tmp_path, "all")
    run = run.model_copy(update={"data": run.data.model_copy(update={"rows_per_epoch": 5})})
    alone = dataset.load(run, "train", tmp_path)
    alone.columns["word"].present[:] = False
    assert alone.steps_per_epoch(1) == 5
    assert alone.with_pairs().steps_per_epoch(1) == len(list(alone.with_pairs().batches(0, 1, 0))) == 3


def test_with_pairs_keeps_all_rows_that_are_paired_by_class(rows: dataset.Dataset) -> None:
    assert len(rows.with_pairs()) == len(rows)


def test_balanced_rows_of_rare_subsets_are_sampled_more_often(tmp_path: Path) -> None:
    two = [[0.0, 9.0], [0.0, 9.0], *[None] * 18]
    rows = by_row(tmp_path, {"one": [[float(row), 0.0] for row in range(20)], "two": two, "text": ["a"] * 20})
    assert rows.balanced(0.0).steps_per_epoch(1) == rows.balanced(1.0).steps_per_epoch(1) == 20
    unchanged, even, between = (column(rows.balanced(b).batches(0, 5, 0), "first", 0) for b in (0.0, 1.0, 0.5))
    assert unchanged == column(rows.batches(0, 5, 0), "first", 0)
    assert np.bincount(even, minlength=20)[:2].tolist() == [5, 5]
    assert np.bincount(even, minlength=20)[2:].max() == 1
    assert np.bincount(between, minlength=20)[:2].sum() == 5  # 20 · √2 / (√2 + √18)
    assert even == column(rows.balanced(1.0).batches(0, 5, 0), "first", 0)
    assert even != column(rows.balanced(1.0).batches(1, 5, 0), "first", 0)
    assert sorted(column(rows.balanced(1.0).batches(0, 5, 0, shuffle=False), "first", 0)) == list(range(20))
    assert sorted(column(rows.balanced(1.0).with_pairs().batches(0, 20, 0), "first", 0)) != list(range(20))


def test_texts_of_a_row_are_all_its_texts_in_the_order_of_the_rows(tmp_path: Path) -> None:
    texts = [["ab", "b"], None, ["c"]]
    columns = {"one": [[float(row), 0.0] for row in range(3)], "two": [[0.0, 0.0]] * 3, "text": texts}
    rows = by_row(tmp_path, columns)
    assert [[text(tokens).strip() for tokens in own] for own in rows.texts("word")] == [["ab", "b"], [""], ["c"]]
    single = by_row(tmp_path, {**columns, "text": ["ab", None, "c"]})
    assert [[text(tokens).strip() for tokens in own] for own in single.texts("word")] == [["ab"], [""], ["c"]]
    kept, held_out = single.hold_out(1)
    assert len(kept.texts("word")) == 2
    assert len(held_out.texts("word")) == 1


def test_pictures_of_encoded_rows_are_those_of_the_file(tmp_path: Path) -> None:
    """Rows 0 and 5 have no picture, row 2 has nothing at all."""
    shades = [None if row in (0, 2, 5) else 30 * row for row in range(8)]
    columns = {
        "picture": [None if shade is None else encode_image(Image.new("RGB", (9, 9), (shade,) * 3)) for shade in shades],
        "one": [None if row == 2 else [float(row), 0.0] for row in range(8)],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    photo = EncodedModality(name="photo", kind="image", encoder=str(write_image_encoder(tmp_path / "encoder").parent))
    source = Source(train="rows.parquet", test="rows.parquet", columns={"first": "one", "photo": "picture"}, licence="CC0")
    data = Data(pairing="row", sources=(source,), cache=tmp_path / "cache", bad_values="absent")
    rows = dataset.load(Config(name="rows", modalities=(FIRST, photo), data=data), "test", tmp_path)
    (batch,) = rows.batches(0, 7, 0, shuffle=True)
    numbers = rows.first_shuffled(7)
    assert sorted(batch.arrays["first"][:, 0].tolist()) == [0, 1, 3, 4, 5, 6, 7]
    assert [[0, 1, 3, 4, 5, 6, 7][number] for number in numbers] == batch.arrays["first"][:, 0].tolist()
    present = numbers[batch.present[:, 1].numpy()]
    found = rows.pictures("photo", present, 4)
    assert found is not None
    features, pictures = found
    assert pictures.shape == (5, 3, 4, 4)
    assert pictures[:, 0, 0, 0].tolist() == [30 * row for row in (1, 3, 4, 6, 7)]
    np.testing.assert_array_equal(features, rows.columns["photo"].values[np.sort(present)])


def test_balance_of_rows_paired_by_class_is_rejected() -> None:
    with pytest.raises(ValueError, match=r'data\.subset_balance takes pairing = "row"'):
        paired(subset_balance=0.5)


def test_complete_rows_restrict_training_rows_and_vocabulary(tmp_path: Path) -> None:
    """Test rows stay the same."""
    for selection, trained, words in (("all", [0, 1, 2, 3, 4, 5], {"a", "b"}), ("complete", [0, 2, 4], {"a"})):
        run = incomplete(tmp_path, selection)
        train, test = dataset.load(run, "train", tmp_path), dataset.load(run, "test", tmp_path)
        assert sorted(column(train.batches(0, 1, 0), "first", 0)) == trained
        assert column(test.batches(0, 2, 0, shuffle=False), "first", 0) == [6, 7]
        assert isinstance(train.modalities[2], TextModality)
        assert set(train.modalities[2].vocabulary) == words


def test_complete_rows_drop_rows_with_invalid_values(tmp_path: Path) -> None:
    run = incomplete(tmp_path, "complete", two=[[0.0, 1.0], [math.nan, 1.0], [2.0, 1.0], [], None, None, [6.0, 1.0], None])
    run = run.model_copy(update={"data": run.data.model_copy(update={"bad_values": "absent"})})
    rows = dataset.load(run, "train", tmp_path)
    assert sorted(column(rows.batches(0, 1, 0), "first", 0)) == [0, 2]


def test_complete_rows_without_any_complete_row_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'incomplete\.parquet: no training row is complete. Set rows = "all"'):
        dataset.load(incomplete(tmp_path, "complete", two=[None] * 6 + [[0.0, 0.0]] * 2), "train", tmp_path)


def test_random_flip_flips_half_of_training_images_and_no_test_images(digits_folder: Path, make_config: Any) -> None:
    plain, flipped = (
        dataset.load(make_config(data={"random_flip": names, "random_offset": []}), "train", digits_folder)
        for names in ((), ("digit",))
    )
    flips = 0
    for epoch in range(20):
        for one, other in zip(plain.batches(epoch, 20, 3), flipped.batches(epoch, 20, 3), strict=True):
            assert torch.equal(one.arrays["word"], other.arrays["word"])
            for before, after in zip(one.arrays["digit"], other.arrays["digit"], strict=True):
                assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
                flips += not torch.equal(after, before)
    assert abs(flips - 600) < 5 * math.sqrt(1200 / 4)
    pairs = zip(plain.batches(0, 20, 0, shuffle=False), flipped.batches(0, 20, 0, shuffle=False), strict=True)
    assert all(equal(*pair) for pair in pairs)


def test_random_shift_moves_images_within_its_range(digits_folder: Path, make_config: Any) -> None:
    """The digits do not touch the edges, so a shift equals a roll."""
    changes = {"random_shift": {"digit": 2}, "random_offset": []}
    plain, shifted = (dataset.load(make_config(data=d), "train", digits_folder) for d in ({"random_offset": []}, changes))
    shifts = set()
    for one, other in zip(plain.batches(0, 20, 3), shifted.batches(0, 20, 3), strict=True):
        for before, after in zip(one.arrays["digit"], other.arrays["digit"], strict=True):
            matches = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if torch.equal(before.roll((y, x), (1, 2)), after)]
            assert len(matches) == 1
            shifts |= set(matches)
    assert len(shifts) > 15


def test_load_without_label_column_has_no_labels(tmp_path: Path) -> None:
    rows = by_row(tmp_path, {"one": [[1.0, 0.0]], "two": [[2.0, 0.0]], "text": ["a"]})
    assert next(rows.batches(0, 1, 0)).labels is None
    assert rows.class_names is None


def test_batch_take_accepts_slice_mask_and_indices(rows: dataset.Dataset) -> None:
    batch = next(rows.batches(0, 8, 0))
    mask = torch.arange(8) % 2 == 0
    for chosen, numbers in ((slice(3), [0, 1, 2]), (mask, [0, 2, 4, 6]), (torch.tensor([5, 0]), [5, 0])):
        taken = batch.take(chosen)
        assert taken.labels is not None
        assert batch.labels is not None
        assert taken.labels.tolist() == batch.labels[numbers].tolist()
        assert torch.equal(taken.present, batch.present[numbers])
        assert all(torch.equal(array, batch.arrays[name][numbers]) for name, array in taken.arrays.items())


def test_writing_to_a_batch_does_not_change_the_dataset(rows: dataset.Dataset) -> None:
    before = next(rows.batches(0, 8, 0))
    overwritten = next(rows.batches(0, 8, 0))
    for array in (*overwritten.arrays.values(), overwritten.present, overwritten.labels):
        assert array is not None
        array.zero_()
    assert equal(before, next(rows.batches(0, 8, 0)))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 0, 1], CLASSES, r"second\.parquet: no row of class 2 \(two\), but first\.parquet has some"),
        (
            [0, 1, 2],
            ["zero", "two", "one"],
            r"first\.parquet and second\.parquet have different class names: .*data\.class_names",
        ),
        ([0, 1, 2, -1], CLASSES, r"second\.parquet: row 3 has no label. Pairing by class needs a label in every row"),
    ],
)
def test_class_pairing_of_incompatible_labels_fails(tmp_path: Path, labels: list[int], names: list[str], message: str) -> None:
    write(tmp_path / "first.parquet", [0, 1, 2])
    write(tmp_path / "second.parquet", labels, names)
    with pytest.raises(DataError, match=message):
        dataset.load(paired(), "train", tmp_path)


def test_class_pairing_never_samples_a_class_without_anchor_rows(tmp_path: Path) -> None:
    write(tmp_path / "first.parquet", [0, 2])
    write(tmp_path / "second.parquet", [0, 1, 2, 1])
    rows = dataset.load(paired(), "train", tmp_path)
    assert {row for epoch in range(20) for row in column(rows.batches(epoch, 2, 0), "second")} == {0, 2}


def test_configured_class_names_replace_those_of_the_sources(tmp_path: Path) -> None:
    write(tmp_path / "first.parquet", [0, 1, 2], ["0", "1", "2"])
    write(tmp_path / "second.parquet", [2, 1, 0], None)
    rows = dataset.load(paired(class_names=tuple(CLASSES)), "train", tmp_path)
    (batch,) = rows.batches(0, 3, 0, shuffle=False)
    assert [text(tokens).strip() for tokens in batch.arrays["word"]] == CLASSES
    assert rows.class_names == tuple(CLASSES)


def test_rows_of_several_texts_have_the_mean_of_their_features_outside_of_training(tmp_path: Path) -> None:
    texts = [["red cup", "a lamp", "blue"], ["plain chair"], None, ["new plate", "fine"]]
    datasets.Dataset.from_dict({"texts": texts, "one": [[0.0, 1.0], [1.0, 0.0]] * 2}).to_parquet(tmp_path / "rows.parquet")
    encoder = write_text_encoder(tmp_path / "encoder").parent
    title = EncodedModality(name="title", kind="text", encoder=str(encoder))
    source = Source(train="rows.parquet", test="rows.parquet", columns={"first": "one", "title": "texts"}, licence="CC0")
    data = Data(pairing="row", sources=(source,), cache=tmp_path / "cache")
    run = Config(name="rows", modalities=(FIRST, title), data=data)
    rows = dataset.load(run, "train", tmp_path)
    column = rows.columns["title"]
    assert column.starts is not None
    means = np.stack([column.values[start:end].mean(axis=0) for start, end in pairwise(column.starts)])
    (batch,) = rows.batches(0, 4, 0, shuffle=False)
    np.testing.assert_allclose(batch.arrays["title"], means, atol=1e-6)
    assert batch.present[:, 1].tolist() == [True, True, False, True]
    (part,) = itertools.islice(rows.batches(0, 3, 0, start=1, shuffle=False), 1)
    np.testing.assert_allclose(part.arrays["title"], means[3:], atol=1e-6)
    (shuffled,) = rows.batches(0, 4, 0, average=True)
    assert sorted(shuffled.arrays["title"][:, 0].tolist()) == pytest.approx(sorted(means[:, 0].tolist()), abs=1e-6)
    epochs = [batch.arrays["title"].tolist() for epoch in range(20) for batch in rows.batches(epoch, 4, 0)]
    assert {tuple(row) for epoch in epochs for row in epoch} == {tuple(row) for row in column.values.tolist()}, (
        "each epoch of training samples one text"
    )
    averaging = run.model_copy(update={"data": data.model_copy(update={"average_texts": ("title",)})})
    rows = dataset.load(averaging, "train", tmp_path)
    epochs = [batch.arrays["title"].numpy() for epoch in range(40) for batch in rows.batches(epoch, 4, 0)]
    sizes = [(1,), (1, 2), (1, 2, 3)]
    subsets = {
        s
        for start, end in pairwise(column.starts)
        for size in sizes[end - start - 1]
        for s in itertools.combinations(range(start, end), size)
    }
    expected = np.stack([column.values[list(subset)].mean(axis=0) for subset in subsets])
    distances = np.abs(np.concatenate(epochs)[:, None] - expected).max(axis=2)
    assert distances.min(axis=1).max() < 1e-5, "each row has the mean of some of its texts"
    assert set(distances.argmin(axis=1)) == set(range(len(expected))), "each epoch samples how many and which"
    (again,) = rows.batches(3, 4, 0)
    np.testing.assert_array_equal(again.arrays["title"], epochs[3])


def test_average_texts_of_a_column_of_single_texts_is_an_error(tmp_path: Path) -> None:
    encoder = write_text_encoder(tmp_path / "texts")
    datasets.Dataset.from_dict({"one": [[0.0, 1.0], [1.0, 0.0]], "text": ["a cup", "a lamp"]}).to_parquet(
        tmp_path / "rows.parquet"
    )
    title = EncodedModality(name="title", kind="text", encoder=str(encoder))
    source = Source(train="rows.parquet", test="rows.parquet", columns={"first": "one", "title": "text"}, licence="CC0")
    data = Data(pairing="row", sources=(source,), cache=tmp_path / "cache", average_texts=("title",))
    run = Config(name="rows", modalities=(FIRST, title), data=data)
    with pytest.raises(DataError, match=r"average_texts names \['title'\], whose rows have one text each.*or remove"):
        dataset.load(run, "train", tmp_path)


def test_vectors_are_standardised_with_training_statistics(tmp_path: Path) -> None:
    numbers = [[0.0, 5.0, 1.0], [2.0, 5.0, 2.0], None]
    for name, rows in (("train", numbers), ("test", [[4.0, 6.0, 1.0], [4.0, 6.0, 1.0], None])):
        datasets.Dataset.from_dict({"numbers": rows, "text": ["a", "b", "c"]}).to_parquet(tmp_path / f"{name}.parquet")
    vector = VectorModality(name="vector", size=3)
    source = Source(train="train.parquet", test="test.parquet", columns={"vector": "numbers", "word": "text"}, licence="CC0")
    run = Config(name="vectors", modalities=(vector, WORD), data=Data(pairing="row", sources=(source,)))
    train, test = dataset.load(run, "train", tmp_path), dataset.load(run, "test", tmp_path)
    fitted = train.modalities[0]
    assert isinstance(fitted, VectorModality)
    assert fitted.mean == (1.0, 5.0, 1.5)
    assert fitted.std == (1.0, 1.0, 0.5)  # 1 for the constant component, which is only centred
    assert test.modalities == train.modalities
    with_mean = run.model_copy(update={"modalities": (vector.model_copy(update={"mean": (1.0, 2.0, 3.0)}), WORD)})
    partly_fitted = dataset.load(with_mean, "train", tmp_path).modalities[0]
    assert isinstance(partly_fitted, VectorModality)
    assert (partly_fitted.mean, partly_fitted.std) == ((1.0, 2.0, 3.0), fitted.std)
    (batch,) = train.batches(0, 3, 0, shuffle=False)
    assert batch.arrays["vector"].tolist() == [[-1, 0, -1], [1, 0, 1], [0, 0, 0]]
    (batch,) = test.batches(0, 3, 0, shuffle=False)
    assert batch.arrays["vector"].tolist() == [[3, 1, -1], [3, 1, -1], [0, 0, 0]]


def test_weights_by_information_are_those_of_both_splits_and_keep_configured_ones(tmp_path: Path) -> None:
    run = incomplete(tmp_path, "all")
    assert [m.weight for m in dataset.load(run, "train", tmp_path).modalities] == [None] * 3, "by size: as in earlier bundles"
    weighted = (run.modalities[0].model_copy(update={"weight": 7.0}), *run.modalities[1:])
    by_information = run.model_copy(update={"objective": Objective(weights="information"), "modalities": weighted})
    train, test = (dataset.load(by_information, split, tmp_path) for split in ("train", "test"))
    assert test.modalities == train.modalities
    word = 8 * math.log(train.modalities[2].categories)  # type: ignore[union-attr]
    assert [m.weight for m in train.modalities] == pytest.approx([7.0, math.sqrt(word / 1.0), 1.0])


def test_vector_absent_from_all_rows_without_statistics_is_rejected(tmp_path: Path) -> None:
    features = datasets.Features({"numbers": datasets.List(datasets.Value("float32")), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"numbers": [None], "text": ["a"]}, features=features).to_parquet(tmp_path / "rows.parquet")
    source = Source(train="rows.parquet", test="rows.parquet", columns={"vector": "numbers", "word": "text"}, licence="CC0")
    run = Config(
        name="vectors", modalities=(VectorModality(name="vector", size=3), WORD), data=Data(pairing="row", sources=(source,))
    )
    with pytest.raises(DataError, match=r"no training row has vector; column numbers, values: 1 null\. Set its mean and std"):
        dataset.load(run, "train", tmp_path)


def test_data_folder_argument_precedes_environment_and_config(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONCORD_DATA", raising=False)
    assert len(dataset.load(paired(folder=folder), "train")) == 21
    with pytest.raises(DataError, match="no such file"):
        dataset.load(paired(folder=folder), "train", tmp_path)
    monkeypatch.setenv("CONCORD_DATA", str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        dataset.load(paired(folder=folder), "train")
    assert len(dataset.load(paired(folder=tmp_path), "train", folder)) == 21


def test_digits_configuration_loads_generated_digits(digits_folder: Path) -> None:
    run = config_file.read(Path(config_file.__file__).parent / "configs" / "digits.toml")
    run = run.model_copy(update={"data": run.data.model_copy(update={"rows_per_epoch": None})})  # the fixture has fewer rows
    rows = dataset.load(run, "train", digits_folder)
    (batch,) = rows.batches(0, 60, run.seed, shuffle=False)
    assert [source.file for source in rows.sources] == ["mnist-train.parquet", "mnist-m-train.parquet"]
    assert {name: tuple(array.shape) for name, array in batch.arrays.items()} == {
        "digit": (60, 1, 28, 28),
        "photo": (60, 3, 32, 32),
        "word": (60, 8),
    }
    assert batch.labels is not None
    assert torch.bincount(batch.labels).tolist() == [6] * 10


def test_training_images_equal_images_parsed_by_the_service_bitwise(digits_folder: Path) -> None:
    run = config_file.read(Path(config_file.__file__).parent / "configs" / "digits.toml")
    (batch,) = dataset.load(run, "test", digits_folder).batches(0, 30, 0, shuffle=False)
    raw = datasets.Dataset.from_parquet(str(digits_folder / "mnist-test.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )
    digit = run.modalities[0]
    assert isinstance(digit, ImageModality)
    served = np.stack([codec.parse_bytes(digit, row["image"]["bytes"]) for row in raw])
    assert batch.arrays["digit"].dtype == torch.float32
    assert np.array_equal(batch.arrays["digit"].numpy(), served)
    assert batch.arrays["digit"].max() > 0.9


def test_test_rows_take_the_statistics_of_training_rows_that_are_read(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not computed a second time."""
    config = make_config(photo=True)
    training, expected = dataset.load(config, "train"), dataset.load(config, "test")
    monkeypatch.setattr(dataset, "fit_preprocessing", None)
    test = dataset.load(config, "test", training=training)
    assert test.modalities == expected.modalities
    assert test.class_names == expected.class_names
