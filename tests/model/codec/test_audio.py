"""Audio files and spectrograms: parity with a plain computation, invariances, conversions, hostile files, waveforms."""

import io
import subprocess
import sys
import time
import wave
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from concord.model import codec
from concord.model.codec import audio
from concord.model.codec.errors import DEFAULT_LIMITS, CodecError
from concord.model.modality import AudioModality, check_array
from tests.support.sounds import RATE, SEVEN, SOUND, encode_sound, speech, unusual_sounds, with_stated_length

FILES = unusual_sounds()


def spectrogram(content: bytes) -> np.ndarray:
    return audio.array_from_file(SOUND, content, DEFAULT_LIMITS)


def plain_spectrogram(samples: np.ndarray) -> np.ndarray:
    """Return the log-mel spectrogram of ``SOUND``, from sums over sines and loops over bands and frames."""
    centre = round(float((np.arange(len(samples)) * samples**2).sum() / (samples**2).sum()))
    clip = np.zeros(RATE + 1024)  # 256 samples before the second, and more after it
    clip[256 + 4000 - centre :][: len(samples)] = samples
    angles = 2 * np.pi * np.outer(np.arange(257), np.arange(512)) / 512
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34) / 2595) - 1)
    mel = np.zeros((32, 32))
    for frame in range(32):
        part = clip[250 * frame :][:512] * hann
        power = (np.cos(angles) @ part) ** 2 + (np.sin(angles) @ part) ** 2
        for band in range(32):
            for index, energy in enumerate(power):
                mel[band, frame] += energy * np.interp(index * RATE / 512, edges[band : band + 3], (0, 1, 0))
    decibels = 10 * np.log10(mel / mel.max() + 1e-30)
    return (np.maximum(decibels, -50) / 50 + 1)[np.newaxis]


def test_spectrogram_equals_a_plain_computation() -> None:
    samples, _ = soundfile.read(SEVEN)
    found = spectrogram(SEVEN.read_bytes())
    check_array(SOUND, found)
    assert np.abs(found - plain_spectrogram(samples)).max() < 1e-5


def test_spectrogram_golden_example_stays_the_same() -> None:
    """The array of a file when bundles of format 5 were first written: bundles in use rely on it."""
    golden = np.load(SEVEN.with_name("seven-spectrogram.npy"))
    assert np.abs(spectrogram(SEVEN.read_bytes()) - golden).max() < 1e-5


@pytest.mark.parametrize("gain", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("padding", [(0, 0), (3000, 0), (500, 40_000)])
def test_spectrogram_loudness_and_silence_have_no_effect(gain: float, padding: tuple[int, int]) -> None:
    samples, _ = soundfile.read(SEVEN)
    changed = encode_sound(np.pad(samples, padding) * gain, subtype="FLOAT")
    np.testing.assert_allclose(spectrogram(changed), spectrogram(SEVEN.read_bytes()), atol=1e-4)


def test_spectrogram_long_clip_keeps_the_second_with_the_most_energy() -> None:
    samples = np.concatenate([0.1 * speech(), np.zeros(3 * RATE), speech(), np.zeros(2 * RATE)])
    np.testing.assert_allclose(spectrogram(encode_sound(samples)), spectrogram(encode_sound(speech())), atol=2e-2)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_spectrogram_other_rates_are_resampled(rate: int) -> None:
    """A tone of 1 kHz sampled at another rate has the spectrogram of one sampled at 8 kHz."""

    def tone(rate: int) -> bytes:
        seconds = np.arange(rate) / rate
        return encode_sound(0.5 * np.hanning(rate) * np.sin(2 * np.pi * 1000 * seconds), rate=rate, subtype="FLOAT")

    np.testing.assert_allclose(spectrogram(tone(rate)), spectrogram(tone(RATE)), atol=5e-3)


def test_spectrogram_channels_are_averaged() -> None:
    left, right = speech(), np.roll(speech(), 2000)
    stereo = encode_sound(np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(spectrogram(stereo), spectrogram(encode_sound((left + right) / 2, subtype="FLOAT")), atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_unusual_file_is_converted_or_rejected(name: str) -> None:
    content, code = FILES[name]
    if code is None:
        array = spectrogram(content)
        check_array(SOUND, array)
        similarity = np.corrcoef(array.ravel(), spectrogram(encode_sound(speech())).ravel())[0, 1]
        assert similarity > 0.8
        return
    with pytest.raises(CodecError) as caught:
        spectrogram(content)
    assert caught.value.code == code
    assert caught.value.detail


def test_truncated_mp3_is_read_as_far_as_it_goes() -> None:
    content = encode_sound(np.tile(speech(), 3), "MP3")
    check_array(SOUND, spectrogram(content[: len(content) * 2 // 3]))


def test_flac_longer_than_its_header_states_is_read_as_far_as_stated() -> None:
    content = with_stated_length(encode_sound(np.tile(speech(), 10), "FLAC"), RATE)
    np.testing.assert_allclose(spectrogram(content), spectrogram(encode_sound(speech())), atol=1e-5)


def test_compressed_bomb_of_unknown_length_is_rejected_without_decoding_it() -> None:
    """An hour in few bytes."""
    hour = encode_sound(np.tile(np.repeat(np.array([-9, 9], np.int16), 4000), 3600), "FLAC")
    start = time.process_time()
    with pytest.raises(CodecError) as caught:
        audio.array_from_file(SOUND, with_stated_length(hour, 0), replace(DEFAULT_LIMITS, audio_seconds=2.0))
    assert caught.value.code == "too_large"
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("limits", [{"audio_bytes": 1000}, {"audio_seconds": 0.4}, {"audio_samples": 3000}])
def test_limits_apply_to_bytes_seconds_and_samples(limits: dict[str, float]) -> None:
    with pytest.raises(CodecError) as caught:
        audio.array_from_file(SOUND, SEVEN.read_bytes(), replace(DEFAULT_LIMITS, **limits))
    assert caught.value.code == "too_large"


_FUZZ = """
import random, re
from pathlib import Path
from concord.model.codec import CodecError, parse_bytes
from tests.support.sounds import SOUND, encode_sound, speech
files = [encode_sound(speech(), *kind) for kind in (("WAV",), ("FLAC",), ("OGG",), ("MP3",))]
files += [encode_sound(speech(), "OGG", subtype="OPUS"), encode_sound(speech(), subtype="IMA_ADPCM")]
generator = random.Random(0)
outcomes = set()
for round in range(3000):
    content = bytearray(generator.choice(files))
    for _ in range(generator.randint(1, 20)):
        place = generator.randrange(min(len(content), generator.choice((64, 256, len(content)))))
        length = generator.randint(1, 48)
        kind = generator.randrange(4)
        if kind == 0:
            content[place] = generator.randrange(256)
        elif kind == 1:
            content[place : place + 4] = generator.choice((b"\\0", b"\\xff", b"\\x7f")) * 4
        elif kind == 2 and len(content) > 100:
            del content[place : place + length]
        else:
            content[place:place] = content[place : place + length]
    if content[:4] == b"RIFF":
        content[4:8] = (len(content) - 8).to_bytes(4, "little")
    try:
        parse_bytes(SOUND, bytes(content))
        outcomes.add("valid")
    except CodecError as error:
        outcomes.add(error.code)
print(sorted(outcomes), re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_damaged_files_are_rejected_in_bounded_memory() -> None:
    """The files are read in another process, because a fault in libsndfile would end the process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FUZZ], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes, kilobytes = done.stdout.rsplit(" ", 1)
    assert "valid" in outcomes
    assert "bad_audio" in outcomes
    assert int(kilobytes) < 200_000


class TestWaveform:
    def test_spectrogram_of_the_waveform_is_the_spectrogram(self) -> None:
        array = spectrogram(SEVEN.read_bytes())
        again = spectrogram(audio.wav_from_samples(audio.samples_from_array(SOUND, array), RATE))
        assert np.abs(again - array).mean() < 0.01

    def test_same_seed_same_waveform(self) -> None:
        array = spectrogram(SEVEN.read_bytes())
        one, same, other = (audio.samples_from_array(SOUND, array, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() > 0.01

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_constant_spectrogram_becomes_finite_samples(self, value: float) -> None:
        samples = audio.samples_from_array(SOUND, np.full(SOUND.shape, value, np.float32))
        assert np.isfinite(samples).all()
        assert np.abs(samples).max() <= 0.71

    def test_wav_is_readable_without_libsndfile(self) -> None:
        samples = speech()
        with wave.open(io.BytesIO(audio.wav_from_samples(samples, RATE))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            levels = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        np.testing.assert_allclose(levels / 32767, samples, atol=1 / 32767)


def test_render_returns_wav_spectrogram_on_demand_or_raw() -> None:
    array = spectrogram(SEVEN.read_bytes())
    value = codec.render(SOUND, array)
    assert {key: value[key] for key in value if key != "data"} == {
        "media_type": "audio/wav",
        "sample_rate": RATE,
        "seconds": 1.0,
    }
    check_array(SOUND, codec.parse(SOUND, {"data": value["data"], "media_type": value["media_type"]}))
    shown = codec.render(SOUND, array, spectrogram=True)["spectrogram"]
    assert shown == codec.render(SOUND, array, audio_format="raw")
    assert shown["shape"] == [1, 32, 32]


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"pip install .*\[audio\]"):
        codec.check_installed([SOUND])


class TestModality:
    def test_shape_rounds_frames_up(self) -> None:
        assert SOUND.shape == (1, 32, 32)
        assert AudioModality(name="s", seconds=1.01, sample_rate=8000, window=512, hop=250, mels=32).shape == (1, 32, 33)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hop": 300}, "at most half the window"),
            ({"seconds": 0.1}, "at least two windows"),
            ({"mels": 90}, "Reduce mels or enlarge the window"),
            ({"window": 511}, "multiple of 2"),
            ({"seconds": 0.0}, "greater than 0"),
        ],
    )
    def test_invalid_field_is_rejected(self, changes: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AudioModality.model_validate({**SOUND.model_dump(), **changes})
