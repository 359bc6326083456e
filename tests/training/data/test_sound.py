"""Columns of sounds: forms of a cell, inferred configurations, rows chosen by a column, translations in time."""

import importlib.metadata
import io
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from concord.model import codec
from concord.model.modality import AudioModality, CategoricalModality
from concord.training.config import Config, Source
from concord.training.data import dataset
from concord.training.data.infer_schema import infer_schema
from concord.training.data.sources import open_table, read_table
from concord.training.data.tables import HubTable
from concord.training.errors import DataError
from tests.support.sounds import RATE, SEVEN, SOUND, encode_sound, speech

CONTENT = SEVEN.read_bytes()
LANGUAGE = CategoricalModality(name="language", classes=("ar", "en"))


def write(folder: Path, rows: dict[str, list[Any]], **features: Any) -> None:
    table = datasets.Dataset.from_dict(rows)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    table.to_parquet(folder / "rows.parquet")


def read(folder: Path, **options: Any) -> Any:
    columns = {"sound": "audio", "language": "language"}
    source = Source(**{"train": "rows.parquet", "test": "rows.parquet", "columns": columns, "licence": "none", **options})
    return read_table(source, "train", {"sound": SOUND, "language": LANGUAGE}, folder)


def test_bytes_paths_and_hugging_face_audio_are_the_same_array(tmp_path: Path) -> None:
    (tmp_path / "seven.flac").write_bytes(CONTENT)
    expected = codec.parse_bytes(SOUND, CONTENT)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    by_struct = [{"bytes": CONTENT, "path": "seven.flac"}, {"bytes": None, "path": "seven.flac"}, None]
    for cells in (
        pa.array(by_struct, struct),
        pa.array([CONTENT, CONTENT, None]),
        pa.array(["seven.flac", "seven.flac", None]),
    ):
        pq.write_table(pa.table({"audio": cells, "language": ["en"] * 3}), tmp_path / "rows.parquet")
        column = read(tmp_path).columns["sound"]
        assert column.present.tolist() == [True, True, False]
        np.testing.assert_array_equal(column.values, [expected, expected, 0 * expected])


def test_decoded_sounds_are_the_arrays_of_their_files(tmp_path: Path) -> None:
    tone = clip(0.5, 44_100)
    mono, resampled = soundfile.read(SEVEN)[0], soundfile.read(io.BytesIO(tone))[0]
    stereo = np.stack([resampled, resampled])
    expected = [codec.parse_bytes(SOUND, content) for content in (CONTENT, CONTENT, tone, tone)]
    rows = [[mono], [mono], [resampled], stereo, None]
    rates = [RATE, RATE, 44_100, 44_100, None]
    for samples in (pa.float64(), pa.list_(pa.float32())):  # of one channel, and of two
        is_mono = samples == pa.float64()
        cells = [
            None if row is None else {"array": (row[0] if is_mono else list(row)), "sampling_rate": rate, "path": None}
            for row, rate in zip(rows, rates, strict=True)
        ]
        kind = pa.struct([("array", pa.list_(samples)), ("sampling_rate", pa.int64()), ("path", pa.string())])
        pq.write_table(pa.table({"audio": pa.array(cells, kind), "language": ["en"] * 5}), tmp_path / "rows.parquet")
        column = read(tmp_path).columns["sound"]
        assert column.present.tolist() == [True] * 4 + [False]
        np.testing.assert_allclose(column.values[:4], expected, atol=1e-5)
        (schema, _) = infer_schema(open_table("rows.parquet", tmp_path))
        assert (schema.role, schema.nulls, schema.fields["seconds"]) == ("audio", 1, 0.5)
        assert schema.note == "sounds of 0.48 to 0.50 s, sampled at 8000 and 44100 Hz"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"array": [0.1, None], "sampling_rate": 8000}, r"decoded samples are \{array, sampling_rate\}"),
        ({"array": [0.1, 0.2], "sampling_rate": None}, r"decoded samples are \{array, sampling_rate\}"),
        ({"array": [], "sampling_rate": 8000}, r"received the shape \[0\]"),
        ({"array": [0.1] * 9000, "sampling_rate": 8}, "the sample rate is 8 Hz"),
        ({"array": [0.1] * 9000 + [float("nan")], "sampling_rate": 8000}, "a sample is not a finite number"),
        ({"array": [0.0] * 700_000, "sampling_rate": 8000}, "87.5 s in 1 channels, 700,000 samples; 60 s"),
        ({"array": [0.1] * 9, "sampling_rate": 8000}, "the clip lasts 1.12 ms"),
    ],
    ids=["null in it", "no rate", "empty", "rate", "NaN", "long", "short"],
)
def test_invalid_decoded_sound_names_its_row_and_reason(tmp_path: Path, cell: dict[str, Any], reason: str) -> None:
    kind = pa.struct([("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64())])
    good = {"array": speech(), "sampling_rate": RATE}
    pq.write_table(pa.table({"audio": pa.array([good, cell], kind), "language": ["en"] * 2}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="row 1, column 'audio': invalid sound: .*" + reason):
        read(tmp_path)


def test_invalid_sound_names_its_row(tmp_path: Path) -> None:
    write(tmp_path, {"audio": [CONTENT, CONTENT[:50]], "language": ["en", "en"]})
    with pytest.raises(DataError, match=r"row 1, column 'audio': invalid sound: the audio file is damaged or cut short"):
        read(tmp_path)
    write(tmp_path, {"audio": ["gone.wav"], "language": ["en"]})
    with pytest.raises(DataError, match=r"row 0, column 'audio': invalid sound: no such file: 'gone\.wav'"):
        read(tmp_path)


def test_where_selects_rows_by_strings_or_class_names_before_they_are_split(tmp_path: Path) -> None:
    rows = {
        "audio": [CONTENT] * 6,
        "language": [1, 0, 1, 0, 1, 1],
        "fold": ["train", "train", "test", "test", "train", "train"],
    }
    write(tmp_path, rows, language=datasets.ClassLabel(names=["ar", "en"]))
    by_column = read(tmp_path, where={"language": "en"}, test=None, split="fold")
    assert len(by_column) == 3
    assert by_column.columns["language"].values[:, 0].tolist() == [1, 1, 1]
    assert len(read(tmp_path, where={"language": "ar", "fold": "test"})) == 1
    assert len(read(tmp_path, where={"language": "en"}, test=None, held_out=0.25)) == 3
    with pytest.raises(DataError, match=r"no row has 'fr' in column 'language'; it holds ar, en"):
        read(tmp_path, where={"language": "fr"})
    with pytest.raises(DataError, match=r"no column \['speaker'\]"):
        read(tmp_path, where={"speaker": "en-1"})


def load_twenty_clips(folder: Path, **options: Any) -> dataset.Dataset:
    """Eighteen training rows with the same clip."""
    write(folder, {"audio": [CONTENT] * 20, "language": ["en", "ar"] * 10})
    columns = {"sound": "audio", "language": "language"}
    source = {"train": "rows.parquet", "held_out": 0.1, "columns": columns, "licence": "none"}
    modalities = [SOUND.model_dump(), LANGUAGE.model_dump()]
    data = {"pairing": "row", "sources": [source], **options}
    return dataset.load(Config.model_validate({"name": "sounds", "modalities": modalities, "data": data}), "train", folder)


def test_random_contrast_keeps_the_peak_and_the_silence_of_sounds(tmp_path: Path) -> None:
    rows = load_twenty_clips(tmp_path, random_contrast={"sound": 0.5})
    expected = codec.parse_bytes(SOUND, CONTENT)
    (first,) = (batch.arrays["sound"].numpy() for batch in rows.batches(0, 18, 0))
    assert (first[:, expected == 0] == 0).all()
    assert (first.max(axis=(1, 2, 3)) == 1).all()
    below = (expected > 0.7) & (expected < 1)  # no factor takes these values to the floor
    factors = ((1 - first) / (1 - np.where(below, expected, 0)))[:, below]
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), atol=1e-4)
    assert np.exp(-0.5) <= factors.min() < 0.8
    assert 1.25 < factors.max() <= np.exp(0.5) + 1e-4
    (again,), (second,) = ([batch.arrays["sound"].numpy() for batch in rows.batches(epoch, 18, 0)] for epoch in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    (still,) = rows.batches(0, 18, 0, shuffle=False)
    assert all(np.array_equal(array, expected) for array in still.arrays["sound"].numpy())


def test_random_shift_moves_sounds_in_time_only(tmp_path: Path) -> None:
    rows = load_twenty_clips(tmp_path, random_shift={"sound": 2})
    expected = codec.parse_bytes(SOUND, CONTENT)
    assert not expected[..., :2].any()
    assert not expected[..., -2:].any()  # so that a translation is a roll
    shifts = set()
    for batch in rows.batches(0, 18, 0):
        for array in batch.arrays["sound"].numpy():
            (shift,) = [s for s in range(-2, 3) if np.array_equal(array, np.roll(expected, s, axis=2))]
            shifts.add(shift)
    assert len(shifts) >= 4
    (still,) = rows.batches(0, 18, 0, shuffle=False)
    assert all(np.array_equal(array, expected) for array in still.arrays["sound"].numpy())


def test_random_shift_of_a_text_names_image_and_audio_modalities() -> None:
    source = {"train": "r.parquet", "held_out": 0.1, "columns": {"sound": "a", "language": "l"}, "licence": "none"}
    modalities = [SOUND.model_dump(), LANGUAGE.model_dump()]
    data = {"pairing": "row", "random_shift": {"language": 2}, "sources": [source]}
    with pytest.raises(ValueError, match=r"random_shift names \['language'\], the image and audio modalities are \['sound'\]"):
        Config.model_validate({"name": "sounds", "modalities": modalities, "data": data})


def clip(seconds: float, rate: int, file_format: str = "WAV") -> bytes:
    tone = np.sin(np.arange(int(seconds * rate)) / 5)
    file = io.BytesIO()
    soundfile.write(file, tone, rate, format=file_format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ([CONTENT] * 20, {"sample_rate": RATE, "seconds": 0.5, "window": 512, "hop": 256}),
        ([clip(1.23, 44_100, "FLAC")] * 20, {"sample_rate": 16_000, "seconds": 1.3, "window": 1024, "hop": 512}),
        ([clip(20, 16_000, "OGG")] * 20, {"sample_rate": 16_000, "seconds": 4.0}),
        ([clip(1, RATE)] * 19 + [clip(9, RATE)], {"seconds": 1.0}),
        ([None, b"no sound", *[CONTENT] * 18], {"sample_rate": RATE}),
    ],
    ids=["speech", "44 kHz", "long", "one long", "some damaged"],
)
def test_inferred_fields_make_a_valid_modality(values: list[bytes | None], fields: dict[str, Any]) -> None:
    table = datasets.Dataset.from_dict({"clip": [value and {"bytes": value, "path": None} for value in values]})
    (schema,) = infer_schema(HubTable(table.cast_column("clip", datasets.Audio(decode=False)), "rows"))
    assert schema.role == "audio"
    assert schema.fields.items() >= fields.items()
    modality = AudioModality(name="clip", **schema.fields)
    codec.parse(modality, codec.render(modality, codec.parse_bytes(modality, encode_sound(speech())))["data"])
    assert schema.note.startswith("sounds of ")
    damaged = (
        "1 of 19 sampled sounds are damaged (the first: not a WAV, FLAC, OGG or MP3 file: 8 bytes that begin with b'no sound')"
    )
    assert (damaged in schema.note) == (b"no sound" in values)


@pytest.mark.parametrize("name", ["path", "clip"])
def test_paths_of_sounds_are_inferred_as_audio(tmp_path: Path, name: str) -> None:
    (tmp_path / "clips").mkdir()
    paths = [f"clips/{row}.{'FLAC' if row % 2 else 'flac'}" for row in range(20)]
    for path in paths[1:]:
        (tmp_path / path).write_bytes(CONTENT)
    pq.write_table(pa.table({name: [*paths, None]}), tmp_path / "rows.parquet")
    (schema,) = infer_schema(open_table("rows.parquet", tmp_path))
    assert (schema.role, schema.nulls) == ("audio", 1)
    assert "1 of 20 sampled sounds are damaged (the first: no such file: 'clips/0.flac'" in schema.note


def test_parsed_sounds_are_kept_for_the_versions_of_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"audio": [CONTENT] * 2, "language": ["en", "ar"]})
    cache = tmp_path / "cache"
    source = Source(
        train="rows.parquet", test="rows.parquet", columns={"sound": "audio", "language": "language"}, licence="none"
    )

    def entries() -> int:
        read_table(source, "train", {"sound": SOUND, "language": LANGUAGE}, tmp_path, cache=cache)
        return len(list(cache.iterdir()))

    assert [entries(), entries()] == [2, 2]
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "soxr" else version(name))
    assert entries() == 3  # of the sound only


def test_missing_package_ends_loading_with_the_extra_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    source = {"train": "r.parquet", "held_out": 0.1, "columns": {"sound": "a", "language": "l"}, "licence": "none"}
    modalities = [SOUND.model_dump(), LANGUAGE.model_dump()]
    config = Config.model_validate({"name": "s", "modalities": modalities, "data": {"pairing": "row", "sources": [source]}})
    with pytest.raises(DataError, match=r"pip install .*\[audio\]"):
        dataset.load(config, "train", tmp_path)
