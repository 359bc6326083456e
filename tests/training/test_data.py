import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import codec
from model.modality import ImageModality, TextModality, VectorModality
from training import config_file, data
from training.config import Config, Data, Source

FIRST = VectorModality(name="first", size=2, mean=(0.0, 0.0), std=(1.0, 1.0))
SECOND = VectorModality(name="second", size=2, mean=(0.0, 0.0), std=(1.0, 1.0))
WORD = TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz")
CLASSES = ["zero", "one", "two"]


def write(file: Path, labels: list[int], names: list[str] | None = CLASSES) -> None:
    """Rows that tell their class and their own number: (label, row)."""
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
    table = Data(**{"pairing": "class", "sources": sources, "random_offset": ("word",), **changes})
    return Config(name="paired", modalities=(SECOND, WORD, FIRST), data=table)  # in another order than the sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired")
    write(folder / "first.parquet", [0, 1, 2] * 7)
    write(folder / "second.parquet", [2] * 3 + [0] * 5 + [1] * 40)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> data.Dataset:
    return data.load(paired(), "train", folder)


def same(one: data.Batch, other: data.Batch) -> bool:
    assert [field.name for field in fields(data.Batch)] == ["arrays", "present", "labels"]
    assert one.labels is not None
    assert other.labels is not None
    alike = [torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays]
    return all(alike) and torch.equal(one.present, other.present) and torch.equal(one.labels, other.labels)


def column(batches: Iterator[data.Batch], name: str, index: int = 1) -> list[int]:
    return [int(value) for batch in batches for value in batch.arrays[name][:, index]]


def text(tokens: torch.Tensor) -> str:
    return "".join(WORD.alphabet[int(token)] for token in tokens)


def test_partners_share_the_class(rows: data.Dataset) -> None:
    for epoch, shuffle in itertools.product(range(3), (True, False)):
        for batch in rows.batches(epoch, 4, seed=0, shuffle=shuffle):
            assert batch.labels is not None
            assert torch.equal(batch.arrays["first"][:, 0].long(), batch.labels)
            assert torch.equal(batch.arrays["second"][:, 0].long(), batch.labels)
            assert [text(tokens).strip() for tokens in batch.arrays["word"]] == [CLASSES[label] for label in batch.labels]
            assert batch.present.shape == (len(batch.labels), 3)
            assert batch.present.all()


def test_an_epoch_takes_every_anchor_once_in_its_own_order(rows: data.Dataset) -> None:
    epochs = [column(rows.batches(epoch, 7, seed=0), "first") for epoch in range(3)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert column(rows.batches(0, 7, seed=1), "first") != epochs[0]
    assert column(rows.batches(0, 4, seed=0, shuffle=False), "first") == list(range(21))


def test_partners_are_drawn_anew_and_uniformly(rows: data.Dataset) -> None:
    epochs = [column(rows.batches(epoch, 21, seed=0, shuffle=False), "second") for epoch in range(300)]
    assert len({tuple(epoch) for epoch in epochs}) == 300
    drawn = np.bincount(np.concatenate(epochs), minlength=48)
    for start, size in ((0, 3), (3, 5), (8, 40)):  # rows of each class in second.parquet
        expected = 7 * 300 / size
        assert np.all(np.abs(drawn[start : start + size] - expected) < 5 * np.sqrt(expected))


def test_evaluation_repeats_itself(rows: data.Dataset, folder: Path) -> None:
    again = data.load(paired(), "test", folder)
    pairs = zip(rows.batches(0, 4, 0, shuffle=False), again.batches(0, 4, 0, shuffle=False), strict=True)
    assert all(same(*pair) for pair in pairs)


@given(
    start=st.integers(0, 12),
    size=st.integers(1, 25),
    epoch=st.integers(0, 99),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_a_resumed_epoch_goes_on_exactly(
    *, rows: data.Dataset, start: int, size: int, epoch: int, seed: int, shuffle: bool
) -> None:
    whole = list(rows.batches(epoch, size, seed, shuffle=shuffle))
    rest = list(rows.batches(epoch, size, seed, start, shuffle=shuffle))
    assert len(whole) == rows.steps_per_epoch(size, shuffle=shuffle)
    assert len(rest) == max(0, len(whole) - start)
    assert all(same(*pair) for pair in zip(whole[start:], rest, strict=True))


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
def test_only_training_drops_the_last_smaller_batch(rows: data.Dataset, size: int, shuffle: bool, sizes: list[int]) -> None:
    assert [len(batch.present) for batch in rows.batches(0, size, 0, shuffle=shuffle)] == sizes
    assert rows.steps_per_epoch(size, shuffle=shuffle) == len(sizes)


def test_a_batch_holds_at_least_one_row(rows: data.Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, received 0"):
        rows.steps_per_epoch(0)


def test_an_epoch_may_take_fewer_rows(folder: Path) -> None:
    short = data.load(paired(rows_per_epoch=10), "train", folder)
    epochs = [column(short.batches(epoch, 5, seed=0), "first") for epoch in range(40)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert set(itertools.chain(*epochs)) == set(range(21))
    assert len(column(short.batches(0, 30, seed=0), "first")) == 10
    assert len(column(short.batches(0, 5, seed=0, shuffle=False), "first")) == 21
    assert len(column(data.load(paired(rows_per_epoch=10), "test", folder).batches(0, 3, seed=0), "first")) == 21


def test_an_epoch_cannot_take_more_rows_than_there_are(folder: Path) -> None:
    with pytest.raises(data.DataError, match=r"first\.parquet: has 21 rows, data\.rows_per_epoch is 22"):
        data.load(paired(rows_per_epoch=22), "train", folder)


def test_texts_move_inside_their_free_room(rows: data.Dataset) -> None:
    places: dict[str, set[int]] = {word: set() for word in CLASSES}
    for epoch in range(60):
        for batch in rows.batches(epoch, 21, seed=0):
            for tokens in batch.arrays["word"]:
                shown = text(tokens)
                places[shown.strip()].add(len(shown) - len(shown.lstrip()))
    assert places == {"zero": set(range(5)), "one": set(range(6)), "two": set(range(6))}


def test_texts_stay_where_they_are_unless_asked(folder: Path) -> None:
    for batch in data.load(paired(random_offset=()), "train", folder).batches(0, 21, seed=0):
        assert all(text(tokens)[0] != " " for tokens in batch.arrays["word"])


def by_row(folder: Path, columns: dict[str, list[Any]], *, label: str | None = None) -> data.Dataset:
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    source = Source(
        train="rows.parquet",
        test="rows.parquet",
        columns={"first": "one", "second": "two", "word": "text"},
        label=label,
        licence="CC0",
    )
    return data.load(
        Config(
            name="rows",
            modalities=(FIRST, SECOND, WORD),
            data=Data(pairing="row", sources=(source,), random_offset=("word",)),
        ),
        "train",
        folder,
    )


def test_rows_stay_together_and_nulls_are_absent(tmp_path: Path) -> None:
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


def lacking(folder: Path, rows: Literal["all", "complete"], *, two: list[Any] | None = None) -> Config:
    """Eight rows that say their number. Some lack the second vector, and these alone have the word b."""
    second = two or [[0.0, 9.0], None, [2.0, 9.0], None, [4.0, 9.0], None, [6.0, 9.0], None]
    columns = {
        "one": [[float(row), 0.0] for row in range(8)],
        "two": second,
        "text": ["a", "b"] * 4,
        "split": ["train"] * 6 + ["test"] * 2,
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "lacking.parquet")
    names = {"first": "one", "second": "two", "word": "text"}
    source = Source(train="lacking.parquet", split="split", columns=names, licence="CC0")
    word = TextModality(name="word", length=8, unit="word")
    return Config(name="rows", modalities=(FIRST, SECOND, word), data=Data(pairing="row", sources=(source,), rows=rows))


def test_training_may_keep_to_complete_rows(tmp_path: Path) -> None:
    """What they alone tell is learned from them alone; the test rows stay the same."""
    for which, trained, words in (("all", [0, 1, 2, 3, 4, 5], {"a", "b"}), ("complete", [0, 2, 4], {"a"})):
        run = lacking(tmp_path, which)
        train, test = data.load(run, "train", tmp_path), data.load(run, "test", tmp_path)
        assert sorted(column(train.batches(0, 1, 0), "first", 0)) == trained
        assert column(test.batches(0, 2, 0, shuffle=False), "first", 0) == [6, 7]
        assert isinstance(train.modalities[2], TextModality)
        assert set(train.modalities[2].vocabulary) == words


def test_rows_that_turn_out_incomplete_are_left_out_too(tmp_path: Path) -> None:
    run = lacking(tmp_path, "complete", two=[[0.0, 1.0], [math.nan, 1.0], [2.0, 1.0], [], None, None, [6.0, 1.0], None])
    run = run.model_copy(update={"data": run.data.model_copy(update={"bad_values": "absent"})})
    rows = data.load(run, "train", tmp_path)
    assert sorted(column(rows.batches(0, 1, 0), "first", 0)) == [0, 2]


def test_no_complete_row_is_told(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r'lacking\.parquet: every training row lacks something: say rows = "all"'):
        data.load(lacking(tmp_path, "complete", two=[None] * 6 + [[0.0, 0.0]] * 2), "train", tmp_path)


def test_pictures_are_mirrored_in_training(digits_folder: Path, make_config: Any) -> None:
    """Each in about half of the epochs, and never while testing."""
    plain, flipped = (
        data.load(make_config(data={"random_flip": names, "random_offset": []}), "train", digits_folder)
        for names in ((), ("digit",))
    )
    mirrored = 0
    for epoch in range(20):
        for one, other in zip(plain.batches(epoch, 20, 3), flipped.batches(epoch, 20, 3), strict=True):
            assert torch.equal(one.arrays["word"], other.arrays["word"])
            for before, after in zip(one.arrays["digit"], other.arrays["digit"], strict=True):
                assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
                mirrored += not torch.equal(after, before)
    assert abs(mirrored - 600) < 5 * math.sqrt(1200 / 4)
    pairs = zip(plain.batches(0, 20, 0, shuffle=False), flipped.batches(0, 20, 0, shuffle=False), strict=True)
    assert all(same(*pair) for pair in pairs)


def test_pictures_move_within_their_range(digits_folder: Path, make_config: Any) -> None:
    """Drawn digits lie within their frame: what is moved has the same ink, elsewhere."""
    changes = {"random_shift": {"digit": 2}, "random_offset": []}
    plain, moved = (data.load(make_config(data=d), "train", digits_folder) for d in ({"random_offset": []}, changes))
    found = set()
    for one, other in zip(plain.batches(0, 20, 3), moved.batches(0, 20, 3), strict=True):
        for before, after in zip(one.arrays["digit"], other.arrays["digit"], strict=True):
            moves = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if torch.equal(before.roll((y, x), (1, 2)), after)]
            assert len(moves) == 1
            found |= set(moves)
    assert len(found) > 15


def test_rows_need_no_labels(tmp_path: Path) -> None:
    rows = by_row(tmp_path, {"one": [[1.0, 0.0]], "two": [[2.0, 0.0]], "text": ["a"]})
    assert next(rows.batches(0, 1, 0)).labels is None
    assert rows.class_names is None


def test_a_batch_can_be_written_to_without_harm(rows: data.Dataset) -> None:
    before = next(rows.batches(0, 8, 0))
    spoilt = next(rows.batches(0, 8, 0))
    for array in (*spoilt.arrays.values(), spoilt.present, spoilt.labels):
        assert array is not None
        array.zero_()
    assert same(before, next(rows.batches(0, 8, 0)))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 0, 1], CLASSES, r"second\.parquet: no row of class 2 \(two\), which first\.parquet has"),
        (
            [0, 1, 2],
            ["zero", "two", "one"],
            r"first\.parquet and second\.parquet name their classes differently: .*data\.class_names",
        ),
        ([0, 1, 2, -1], CLASSES, r"second\.parquet: row 3 has no label. Pairing by class needs one in every row"),
    ],
)
def test_classes_that_cannot_be_paired_are_refused(tmp_path: Path, labels: list[int], names: list[str], message: str) -> None:
    write(tmp_path / "first.parquet", [0, 1, 2])
    write(tmp_path / "second.parquet", labels, names)
    with pytest.raises(data.DataError, match=message):
        data.load(paired(), "train", tmp_path)


def test_a_class_that_no_anchor_has_is_never_drawn(tmp_path: Path) -> None:
    write(tmp_path / "first.parquet", [0, 2])
    write(tmp_path / "second.parquet", [0, 1, 2, 1])
    rows = data.load(paired(), "train", tmp_path)
    assert {row for epoch in range(20) for row in column(rows.batches(epoch, 2, 0), "second")} == {0, 2}


def test_configured_names_bring_different_sources_together(tmp_path: Path) -> None:
    write(tmp_path / "first.parquet", [0, 1, 2], ["0", "1", "2"])
    write(tmp_path / "second.parquet", [2, 1, 0], None)
    rows = data.load(paired(class_names=tuple(CLASSES)), "train", tmp_path)
    (batch,) = rows.batches(0, 3, 0, shuffle=False)
    assert [text(tokens).strip() for tokens in batch.arrays["word"]] == CLASSES
    assert rows.class_names == tuple(CLASSES)


def test_vectors_are_standardised_by_the_training_rows(tmp_path: Path) -> None:
    numbers = [[0.0, 5.0, 1.0], [2.0, 5.0, 2.0], None]
    for name, rows in (("train", numbers), ("test", [[4.0, 6.0, 1.0], [4.0, 6.0, 1.0], None])):
        datasets.Dataset.from_dict({"numbers": rows, "text": ["a", "b", "c"]}).to_parquet(tmp_path / f"{name}.parquet")
    vector = VectorModality(name="vector", size=3)
    source = Source(train="train.parquet", test="test.parquet", columns={"vector": "numbers", "word": "text"}, licence="CC0")
    run = Config(name="vectors", modalities=(vector, WORD), data=Data(pairing="row", sources=(source,)))
    train, test = data.load(run, "train", tmp_path), data.load(run, "test", tmp_path)
    found = train.modalities[0]
    assert isinstance(found, VectorModality)
    assert found.mean == (1.0, 5.0, 1.5)
    assert found.std == (1.0, 1.0, 0.5)  # a number that never changes is left at its distance from the mean
    assert test.modalities == train.modalities
    given = run.model_copy(update={"modalities": (vector.model_copy(update={"mean": (1.0, 2.0, 3.0)}), WORD)})
    kept = data.load(given, "train", tmp_path).modalities[0]
    assert isinstance(kept, VectorModality)
    assert (kept.mean, kept.std) == ((1.0, 2.0, 3.0), found.std)
    (batch,) = train.batches(0, 3, 0, shuffle=False)
    assert batch.arrays["vector"].tolist() == [[-1, 0, -1], [1, 0, 1], [0, 0, 0]]
    (batch,) = test.batches(0, 3, 0, shuffle=False)
    assert batch.arrays["vector"].tolist() == [[3, 1, -1], [3, 1, -1], [0, 0, 0]]


def test_a_vector_that_no_row_holds_has_no_statistics(tmp_path: Path) -> None:
    features = datasets.Features({"numbers": datasets.List(datasets.Value("float32")), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"numbers": [None], "text": ["a"]}, features=features).to_parquet(tmp_path / "rows.parquet")
    source = Source(train="rows.parquet", test="rows.parquet", columns={"vector": "numbers", "word": "text"}, licence="CC0")
    run = Config(
        name="vectors", modalities=(VectorModality(name="vector", size=3), WORD), data=Data(pairing="row", sources=(source,))
    )
    with pytest.raises(data.DataError, match=r"rows\.parquet: no row holds vector: give it a mean and a std"):
        data.load(run, "train", tmp_path)


def test_the_folder_is_found_in_this_order(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONCORD_DATA", raising=False)
    assert len(data.load(paired(folder=folder), "train")) == 21
    with pytest.raises(data.DataError, match="no such file"):
        data.load(paired(folder=folder), "train", tmp_path)
    monkeypatch.setenv("CONCORD_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match="no such file"):
        data.load(paired(folder=folder), "train")
    assert len(data.load(paired(folder=tmp_path), "train", folder)) == 21


def test_shipped_configuration_reads_the_drawn_digits(digits_folder: Path) -> None:
    run = config_file.read(Path(config_file.__file__).parent / "configs" / "digits.toml")
    run = run.model_copy(update={"data": run.data.model_copy(update={"rows_per_epoch": None})})  # fewer were drawn
    rows = data.load(run, "train", digits_folder)
    (batch,) = rows.batches(0, 60, run.seed, shuffle=False)
    assert [source.file for source in rows.sources] == ["mnist-train.parquet", "mnist-m-train.parquet"]
    assert {name: tuple(array.shape) for name, array in batch.arrays.items()} == {
        "digit": (60, 1, 28, 28),
        "photo": (60, 3, 32, 32),
        "word": (60, 8),
    }
    assert batch.labels is not None
    assert torch.bincount(batch.labels).tolist() == [6] * 10


def test_images_reach_the_networks_as_serving_decodes_them(digits_folder: Path) -> None:
    """The same bits: a picture sent to the service must be the picture the encoder was trained on."""
    run = config_file.read(Path(config_file.__file__).parent / "configs" / "digits.toml")
    (batch,) = data.load(run, "test", digits_folder).batches(0, 30, 0, shuffle=False)
    raw = datasets.Dataset.from_parquet(str(digits_folder / "mnist-test.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )
    digit = run.modalities[0]
    assert isinstance(digit, ImageModality)
    served = np.stack([codec.decode_bytes(digit, row["image"]["bytes"]) for row in raw])
    assert batch.arrays["digit"].dtype == torch.float32
    assert np.array_equal(batch.arrays["digit"].numpy(), served)
    assert batch.arrays["digit"].max() > 0.9
