"""Spoken digits measured over HTTP, on a few rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.server import ROOT
from tests.support.sounds import SEVEN
from tests.tools.spoken import main

FIXTURES = ROOT / "tests" / "fixtures"


@pytest.mark.slow
def test_spoken_reports_every_direction_of_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One clip and one drawing of a seven; the probe is fitted to two classes, of which the test rows have one."""
    clips = [{"audio": {"bytes": SEVEN.read_bytes()}, "label": 7, "language": "en", "split": "test"}] * 10
    clips += [{**clip, "label": label, "split": "train"} for clip in clips for label in (6, 7)]
    pq.write_table(pa.Table.from_pylist(clips), tmp_path / "spoken-digits.parquet")
    for name, picture in {"mnist": "digit-7.png", "mnist-m": "photo-7.png"}.items():
        rows = [{"image": {"bytes": (FIXTURES / picture).read_bytes()}, "label": 7}] * 10
        for split in ("train", "test"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}-{split}.parquet")
    main(tmp_path)
    figures = json.loads(capsys.readouterr().out)
    directions = [name for name in figures if "->" in name]
    assert sorted(directions) == ["digit -> sound", "photo -> sound", "sound -> digit", "sound -> word", "word -> sound"]
    assert figures["accuracy of the sound classifier"] == 1
    assert figures["word -> sound"] >= 0.8
    assert figures["sound -> word"] >= 0.5
    assert set(figures["decoding, ms"]) == {"WAV", "FLAC", "OGG", "MP3", "WAV of 48 kHz"}
