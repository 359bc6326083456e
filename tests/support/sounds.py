"""Audio files for tests: valid, unusual, and made to do harm."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from concord.model.modality import AudioModality

SEVEN = Path(__file__).parents[1] / "fixtures" / "seven.flac"
"""A person who says "seven": 0.48 s at 8 kHz."""
RATE = 8000
SOUND = AudioModality(name="sound", sample_rate=RATE, seconds=1.0, window=512, hop=250, mels=32, floor=-50.0)
_FLAC_TOTAL = slice(21, 26)
"""Bytes of a FLAC file whose last 36 bits are the number of samples."""


def speech() -> np.ndarray:
    """Return the samples of ``SEVEN``, followed by silence up to one second."""
    samples, _ = soundfile.read(SEVEN, dtype="float32")
    return np.pad(samples, (0, RATE - len(samples)))


def encode_sound(samples: Any, file_format: str = "WAV", *, rate: int = RATE, subtype: str | None = None) -> bytes:
    """Return the bytes of an audio file.

    Args:
        samples: (sample,) or (sample, channel).
    """
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype)
    return file.getvalue()


def with_stated_length(flac: bytes, samples: int) -> bytes:
    """Return a FLAC file whose header states another number of samples. 0: unknown."""
    stated = int.from_bytes(flac[_FLAC_TOTAL], "big") >> 36 << 36 | samples
    return flac[: _FLAC_TOTAL.start] + stated.to_bytes(5, "big") + flac[_FLAC_TOTAL.stop :]


def unusual_sounds() -> dict[str, tuple[bytes, str | None]]:
    """Return files with the code of the error that is right for them. None: the file is a valid row."""
    samples = speech()
    wav, flac = encode_sound(samples), encode_sound(samples, "FLAC")
    ogg = encode_sound(samples, "OGG", subtype="VORBIS")
    eight_hours = encode_sound(np.zeros(8 * 3600 * RATE, np.int16), "FLAC")
    return {
        "WAV": (wav, None),
        "FLAC": (flac, None),
        "FLAC of unknown length": (with_stated_length(flac, 0), None),
        "OGG Vorbis": (ogg, None),
        "OGG Opus": (encode_sound(samples, "OGG", subtype="OPUS"), None),
        "MP3": (encode_sound(samples, "MP3"), None),
        "24 bits": (encode_sound(samples, subtype="PCM_24"), None),
        "192 kHz": (encode_sound(np.repeat(samples, 24), rate=24 * RATE), None),
        "9 channels": (encode_sound(np.stack([samples] * 9, axis=1)), None),
        "floats up to 1e38": (encode_sound(samples * 1e38, subtype="FLOAT"), None),
        "empty": (b"", "bad_audio"),
        "text": (b"This is a text and no sound.", "bad_audio"),
        "text called WAVE": (b"RIFF\x20\0\0\0WAVE" + b"This is a text and no sound.", "bad_audio"),
        "half a WAV": (wav[: len(wav) // 2], "bad_audio"),
        "half a FLAC": (flac[: len(flac) // 2], "bad_audio"),
        "header of a FLAC": (flac[:60], "bad_audio"),
        "two thirds of an OGG": (ogg[: len(ogg) * 2 // 3], "bad_audio"),
        "no sample": (encode_sound(samples[:0]), "bad_audio"),
        "1 sample": (encode_sound(samples[:1] + 0.5), "bad_audio"),
        "silence": (encode_sound(np.zeros(RATE)), "bad_audio"),
        "NaN": (encode_sound(np.where(np.arange(RATE) == 4000, np.nan, samples), subtype="FLOAT"), "bad_audio"),
        "infinity": (encode_sound(np.where(np.arange(RATE) == 4000, np.inf, samples), subtype="FLOAT"), "bad_audio"),
        "100 Hz": (encode_sound(samples, rate=100), "bad_audio"),
        "MP4": (b"\0\0\0\x20ftypM4A isom" + bytes(64), "unsupported_media_type"),
        "WebM": (b"\x1aE\xdf\xa3" + bytes(64), "unsupported_media_type"),
        "AIFF": (encode_sound(samples, "AIFF"), "unsupported_media_type"),
        "8 hours": (eight_hours, "too_large"),
        "8 hours of unknown length": (with_stated_length(eight_hours, 0), "too_large"),
    }
