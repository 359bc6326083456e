"""Features are computed once: across runs, after a crash, and of equal values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.encoder import EncoderFiles
from concord.model.runtime.frozen import FrozenEncoder
from concord.training.encoders import features
from concord.training.encoders.features import FeatureFile, StoredFeatures
from concord.training.encoders.find import find_encoder
from tests.support.encoders import write_text_encoder

TEXTS = ["red cup", "blue lamp", "red cup", "a new green plate", "plain chair"]


@pytest.fixture
def files(tmp_path: Path) -> EncoderFiles:
    return find_encoder(str(write_text_encoder(tmp_path / "text").parent), "text", tmp_path / "cache")


def stored(files: EncoderFiles, cache: Path) -> StoredFeatures:
    return StoredFeatures(files, cache, "cpu", 1, "title")


def compute(found: StoredFeatures, texts: list[str] = TEXTS, too_long: Any = "cut") -> list[Any]:
    with found.computing():
        for text in texts:
            found.tokens(text, too_long, DEFAULT_LIMITS)
    return [found.tokens(text, too_long, DEFAULT_LIMITS) for text in texts]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that networks were run on."""
    rows: list[int] = []
    run = FrozenEncoder.features

    def count(encoder: FrozenEncoder, inputs: Any) -> Any:
        rows.append(len(inputs))
        return run(encoder, inputs)

    monkeypatch.setattr(FrozenEncoder, "features", count)
    return rows


def test_equal_values_are_computed_once_and_a_second_run_computes_nothing(
    files: EncoderFiles, tmp_path: Path, computed: list[int]
) -> None:
    first = compute(stored(files, tmp_path))
    assert computed == [len(set(TEXTS))]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(compute(stored(files, tmp_path)), first)
    assert len(computed) == 1


def test_stored_features_are_those_of_the_encoder(files: EncoderFiles, tmp_path: Path) -> None:
    found = stored(files, tmp_path)
    direct = [found.tokens(text, "cut", DEFAULT_LIMITS) for text in TEXTS]  # not in the context: computed at once
    np.testing.assert_allclose(compute(found), direct, rtol=1e-5, atol=1e-6)


def test_another_encoder_has_another_file(files: EncoderFiles, tmp_path: Path) -> None:
    first = compute(stored(files, tmp_path))
    other = find_encoder(str(write_text_encoder(tmp_path / "text", seed=1).parent), "text", tmp_path / "cache")
    assert not np.allclose(compute(stored(other, tmp_path)), first)
    assert len(list((tmp_path / "features").iterdir())) == 2


@pytest.mark.parametrize("cut", [1, 17, 80])
def test_file_cut_within_a_record_loses_this_record_only(
    files: EncoderFiles, tmp_path: Path, computed: list[int], cut: int
) -> None:
    first = compute(stored(files, tmp_path))
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-cut])  # a killed process
    np.testing.assert_allclose(compute(stored(files, tmp_path)), first, rtol=1e-5, atol=1e-6)
    assert computed[1:] == [1]
    np.testing.assert_allclose(compute(stored(files, tmp_path)), first, rtol=1e-5, atol=1e-6)
    assert len(computed) == 2


def test_damaged_record_is_computed_again(files: EncoderFiles, tmp_path: Path, computed: list[int]) -> None:
    first = compute(stored(files, tmp_path))
    (file,) = (tmp_path / "features").iterdir()
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    np.testing.assert_allclose(compute(stored(files, tmp_path)), first, rtol=1e-5, atol=1e-6)
    assert computed[1:] == [1]


def test_error_while_computing_keeps_the_batches_before(
    files: EncoderFiles, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH_ROWS", 2)
    found = stored(files, tmp_path)
    with pytest.raises(ValueError, match="empty"):  # as a crash would
        compute(found, [*TEXTS[:2], "plain lamp", " "])
    compute(stored(files, tmp_path))
    assert computed == [2, 2]  # "plain lamp" was lost, and is not needed any more


def test_two_processes_append_to_one_file(tmp_path: Path) -> None:
    one, other = FeatureFile(tmp_path / "f.bin", 2), FeatureFile(tmp_path / "f.bin", 2)
    for number, file in enumerate((one, other, one)):
        with file.locked():
            file.append([bytes([number]) * 32], np.full((1, 2), number, np.float32), [False])
    assert len(other) == 2
    with other.locked():
        assert [other.get(bytes([n]) * 32)[0].tolist() for n in range(3)] == [[n, n] for n in range(3)]  # type: ignore[index]


def test_cut_texts_are_counted_and_not_accepted_by_refuse(files: EncoderFiles, tmp_path: Path) -> None:
    long = "red cup " * 9
    compute(stored(files, tmp_path), [*TEXTS, long])
    again = stored(files, tmp_path)
    compute(again, [*TEXTS, long])
    assert again.notes == ["title: 1 texts are cut to the 8 tokens that the encoder reads"]
    with pytest.raises(ValueError, match="20 tokens, the encoder reads 8"):
        stored(files, tmp_path).tokens(long, "refuse", DEFAULT_LIMITS)
