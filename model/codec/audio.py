"""Audio file <-> log-mel spectrogram, and the waveform of a spectrogram.

A file is prepared in these steps:

1. WAV, FLAC, OGG or MP3, recognised by its first bytes, is decoded in blocks. A truncated MP3, and a file longer than its
   header states, are read as far as they go. A truncated file of another format is an error.
2. The channels are averaged, and the result is resampled to ``modality.sample_rate``.
3. Of a clip longer than ``modality.seconds`` the part with the most energy is kept. The part is moved so that its centre of
   energy lies in the middle, between zeros. Silence before and after a sound therefore has no effect.
4. The power of a short-time Fourier transform with a Hann window is summed in triangular filters on the mel scale
   (``modality.band_edges``).
5. Decibels relative to the loudest value, from ``modality.floor`` to 0, become [0, 1]. The loudness of the recording therefore
   has no effect.

Sources: Davis & Mermelstein (1980) for the filters; Griffin & Lim (1984), with the momentum of Perraudin, Balazs & Søndergaard
(2013), for the waveform; Lee & Seung (2001), the multiplicative updates, for the power spectrum of a mel spectrum.
"""

import io
import math
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Complex128, Float32, Float64
from numpy.typing import NDArray

from concord.model.codec.errors import CodecError, Limits
from concord.model.installation import not_installed
from concord.model.modality import AudioModality

MEDIA_TYPES = (
    "audio/wav",
    "audio/x-wav",
    "audio/wave",
    "audio/vnd.wave",
    "audio/flac",
    "audio/x-flac",
    "audio/ogg",
    "application/ogg",
    "audio/mpeg",
    "audio/mp3",
)
_FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3"})
"""Names that libsndfile has for the accepted formats."""
_UNSUPPORTED_SIGNATURES = {
    b"\x1aE\xdf\xa3": "WebM or Matroska",
    b"FORM": "AIFF",
    b".snd": "AU",
    b"caff": "CAF",
    b"RF64": "RF64",
    b"#!AMR": "AMR",
    b"0&\xb2u": "WMA",
    b"MThd": "MIDI",
}
_RATES = (1_000, 384_000)
"""Lowest and highest sample rate of a file, in Hz."""
_BLOCK_SAMPLES = 1 << 16
"""Samples of all channels together that are decoded at a time."""
_UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports at least this number for a file that does not state its length."""
_UNKNOWN_BYTES = 0x7FFF0000
"""A WAV file that was written to a pipe states this length, or a larger one."""
_SILENCE = 1e-4
"""A clip without any sample above this level, -80 dB of full scale, is silent."""
_ITERATIONS, _MOMENTUM = 32, 0.99
_INVERSION_STEPS = 50
_PEAK = 0.7
"""Highest sample of a generated waveform."""


def check_installed() -> None:
    """Check that the libraries for audio files can be imported.

    Raises:
        ImportError: they are not installed. The message says how to install them.
    """
    _libraries()


def array_from_file(modality: AudioModality, content: bytes, limits: Limits) -> Float32[np.ndarray, "1 mel frame"]:
    """Spectrogram (1, mels, frames) in [0, 1] of the bytes of an audio file.

    Raises:
        CodecError: ``unsupported_media_type`` or ``too_large`` before anything is decoded; ``too_large`` also as soon as a file
            that states no length or a wrong one turns out to exceed a limit; ``bad_audio`` if the file is damaged, cut short,
            silent, too short or has samples that are not finite.
        ImportError: see ``check_installed``.
    """
    if len(content) > limits.audio_bytes:
        raise CodecError("too_large", f"the audio file has {len(content)} bytes, {limits.audio_bytes} are allowed")
    _check_signature(content)
    return array_from_samples(modality, _decode(modality, content, limits))


def array_from_waveform(
    modality: AudioModality, waveform: Float64[np.ndarray, "..."], rate: int, limits: Limits
) -> Float32[np.ndarray, "1 mel frame"]:
    """Spectrogram (1, mels, frames) in [0, 1] of samples in memory: as of a file that holds them.

    Args:
        waveform: (sample,) in [-1, 1], or two axes, of which the shorter one is the channels.
        rate: in Hz.

    Raises:
        CodecError: ``bad_audio`` or ``too_large``, as for a file.
        ImportError: see ``check_installed``.
    """
    if waveform.ndim not in (1, 2) or not waveform.size:
        raise CodecError("bad_audio", f"samples have one axis, or two with channels; received the shape {list(waveform.shape)}")
    _check_rate(rate)
    length = max(waveform.shape)
    _check_length(length, waveform.size // length, rate, limits)
    mono = waveform.mean(axis=int(np.argmin(waveform.shape))) if waveform.ndim == 2 else waveform
    if not bool(np.isfinite(mono).all()):
        raise CodecError("bad_audio", "a sample is not a finite number")
    return array_from_samples(modality, _resample(modality, rate, [mono.astype(np.float32)]))


def read_header(content: bytes) -> tuple[int, float]:
    """Sample rate in Hz and length in seconds that an audio file states. The length is infinite if it states none.

    Raises:
        CodecError: the content is no audio file.
        ImportError: see ``check_installed``.
    """
    _check_signature(content)
    soundfile, _ = _libraries()
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            return file.samplerate, file.frames / file.samplerate if file.frames < _UNKNOWN_FRAMES else math.inf
    except Exception as error:  # see _decode
        raise CodecError("bad_audio", "the audio file is damaged or cut short") from error


def array_from_samples(modality: AudioModality, samples: Float32[np.ndarray, " sample"]) -> Float32[np.ndarray, "1 mel frame"]:
    """Spectrogram (1, mels, frames) in [0, 1] of mono samples at ``modality.sample_rate``.

    Raises:
        CodecError: ``bad_audio`` if the clip is silent, too short or has samples that are not finite.
    """
    if not bool(np.isfinite(samples).all()):
        raise CodecError("bad_audio", f"sample {int(np.argmin(np.isfinite(samples)))} is not a finite number")
    if len(samples) < modality.window:
        milliseconds = 1000 / modality.sample_rate
        raise CodecError(
            "bad_audio",
            f"the clip lasts {len(samples) * milliseconds:.3g} ms, at least {modality.window * milliseconds:.3g} ms are needed",
        )
    if float(np.abs(samples).max()) < _SILENCE:
        raise CodecError("bad_audio", "the clip is silent: leave the modality out if it is absent")
    power = np.abs(_transform(modality, _fit_length(modality, samples))) ** 2
    mel = _filters(modality) @ power
    with np.errstate(divide="ignore"):
        decibels = 10 * np.log10(mel / mel.max())
    levels: NDArray[np.float32] = np.clip(1 - decibels / modality.floor, 0, 1).astype(np.float32)
    return levels[np.newaxis]


def samples_from_array(
    modality: AudioModality, array: Float32[np.ndarray, "1 mel frame"], seed: int = 0
) -> Float32[np.ndarray, " sample"]:
    """Waveform of a spectrogram in [0, 1], at ``modality.sample_rate``, with its highest sample at 0.7.

    Args:
        seed: of the phases with which the iteration begins.
    """
    levels = np.clip(array[0].astype(np.float64), 0, 1)
    mel = np.where(levels > 0, 10 ** ((1 - levels) * modality.floor / 10), 0)
    magnitudes = np.sqrt(_invert_filters(modality, mel))
    phases = np.random.default_rng(seed).uniform(0, 2 * math.pi, magnitudes.shape)
    estimate = previous = magnitudes * np.exp(1j * phases)
    for _ in range(_ITERATIONS):
        consistent = _transform(modality, _inverse_transform(modality, estimate))
        moved = consistent + _MOMENTUM * (consistent - previous)
        estimate, previous = magnitudes * np.exp(1j * np.angle(moved)), consistent
    samples = _inverse_transform(modality, estimate)
    return (samples * (_PEAK / max(float(np.abs(samples).max()), 1e-9))).astype(np.float32)


def wav_from_samples(samples: Float32[np.ndarray, " sample"], rate: int) -> bytes:
    """Bytes of a WAV file: mono, 16 bits.

    Args:
        samples: in [-1, 1]; samples outside are clipped.
        rate: in Hz.
    """
    content: bytes = np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", 36 + len(content), b"WAVE")
    return head + form + struct.pack("<4sI", b"data", len(content)) + content


def has_signature(content: bytes) -> bool:
    """Whether a file begins as one of the accepted formats does."""
    is_wav = content[:4] == b"RIFF" and content[8:12] == b"WAVE"
    is_mpeg = content[:1] == b"\xff" and content[1:2] >= b"\xe0"
    return is_wav or is_mpeg or content.startswith((b"fLaC", b"OggS", b"ID3"))


def _libraries() -> tuple[Any, Any]:
    try:
        import soundfile  # noqa: PLC0415 - optional packages
        import soxr  # noqa: PLC0415
    except (ImportError, OSError) as error:  # OSError: libsndfile is missing
        raise ImportError(not_installed("soundfile or soxr", "Audio", "audio")) from error
    return soundfile, soxr


def _check_signature(content: bytes) -> None:
    """Check that a file begins as one of the accepted formats does, and that a WAV file has the length that it states.

    Raises:
        CodecError: ``unsupported_media_type`` for a known format that is not accepted, else ``bad_audio``.
    """
    unsupported = next((name for signature, name in _UNSUPPORTED_SIGNATURES.items() if content.startswith(signature)), None)
    if content[4:8] == b"ftyp":
        unsupported = "MP4 (M4A, AAC)"
    if unsupported:
        raise CodecError("unsupported_media_type", f"the content is {unsupported}: send WAV, FLAC, OGG or MP3")
    stated = int.from_bytes(content[4:8], "little") + 8
    if content[:4] == b"RIFF" and len(content) < stated < _UNKNOWN_BYTES:
        raise CodecError("bad_audio", f"the WAV file is cut short: it has {len(content)} of {stated} bytes")
    if not has_signature(content):
        raise CodecError("bad_audio", f"not a WAV, FLAC, OGG or MP3 file: {len(content)} bytes that begin with {content[:8]!r}")


def _decode(modality: AudioModality, content: bytes, limits: Limits) -> Float32[np.ndarray, " sample"]:
    """Mono samples at ``modality.sample_rate``. The memory in use is that of the result, the limits bound it."""
    soundfile, _ = _libraries()
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_header(file, limits)
            file.seekable = lambda: False  # soundfile would seek after each block, which fails if the length is unknown
            return _resample(modality, file.samplerate, _mono_blocks(file, limits))
    except CodecError:
        raise
    except Exception as error:  # soundfile raises RuntimeError, TypeError and ValueError, soxr RuntimeError and ValueError
        raise CodecError("bad_audio", "the audio file is damaged or cut short") from error


def _mono_blocks(file: Any, limits: Limits) -> Iterator[Float32[np.ndarray, " sample"]]:
    """The mean of an open file's channels, some samples at a time."""
    rows = max(1, _BLOCK_SAMPLES // file.channels)
    most = min(limits.audio_samples // file.channels, int(limits.audio_seconds * file.samplerate))
    count = 0
    while len(block := file.read(rows, dtype="float32", always_2d=True)):
        count += len(block)
        if count > most:
            raise _too_long(limits, f"more than {most / file.samplerate:.4g} s in {file.channels} channels")
        with np.errstate(invalid="ignore", over="ignore"):  # checked next
            mono = block.mean(axis=1, dtype=np.float32)
        if not bool(np.isfinite(mono).all()):
            raise CodecError("bad_audio", "a sample is not a finite number")
        yield mono
    if not count:
        raise CodecError("bad_audio", "the audio file has no samples that can be read")
    if count < file.frames < _UNKNOWN_FRAMES and file.format == "FLAC":
        raise CodecError("bad_audio", f"the FLAC file is cut short or damaged after sample {count} of {file.frames}")


def _resample(
    modality: AudioModality, rate: int, blocks: Iterable[Float32[np.ndarray, " _"]]
) -> Float32[np.ndarray, " sample"]:
    """The samples of all blocks at ``modality.sample_rate``."""
    if rate == modality.sample_rate:
        return np.concatenate(list(blocks))
    _, soxr = _libraries()
    resampler = soxr.ResampleStream(rate, modality.sample_rate, 1, dtype="float32")
    parts = [resampler.resample_chunk(block) for block in blocks]
    return np.concatenate([*parts, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])


def _check_header(file: Any, limits: Limits) -> None:
    """Check format, rate and length that an open file states.

    Raises:
        CodecError: ``unsupported_media_type``, ``bad_audio`` or ``too_large``.
    """
    if file.format not in _FORMATS:
        raise CodecError("unsupported_media_type", f"the content is {file.format_info}: send WAV, FLAC, OGG or MP3")
    _check_rate(file.samplerate)
    if file.frames < _UNKNOWN_FRAMES:
        _check_length(file.frames, file.channels, file.samplerate, limits)


def _check_rate(rate: int) -> None:
    low, high = _RATES
    if not low <= rate <= high:
        raise CodecError("bad_audio", f"the sample rate is {rate} Hz, {low} to {high} Hz are allowed")


def _check_length(frames: int, channels: int, rate: int, limits: Limits) -> None:
    if frames / rate > limits.audio_seconds or frames * channels > limits.audio_samples:
        raise _too_long(limits, f"{frames / rate:,.4g} s in {channels} channels, {frames * channels:,} samples")


def _too_long(limits: Limits, received: str) -> CodecError:
    return CodecError(
        "too_large",
        f"the clip has {received}; {limits.audio_seconds:g} s and {limits.audio_samples:,} samples in all channels are allowed",
    )


def _fit_length(modality: AudioModality, samples: Float32[np.ndarray, " sample"]) -> Float64[np.ndarray, " length"]:
    """The ``modality.samples`` samples with the most energy, moved so that their centre of energy lies in the middle."""
    length = modality.samples
    clip = samples.astype(np.float64)
    if len(clip) > length:
        total = np.concatenate([[0.0], np.cumsum(clip**2)])
        start = int(np.argmax(total[length:] - total[:-length]))
        clip = clip[start : start + length]
    energy = clip**2
    centre = round(float(np.arange(len(clip)) @ energy / energy.sum()))
    start = length // 2 - centre  # of the clip in the result
    fitted = np.zeros(length)
    first, last = max(0, start), min(length, start + len(clip))
    fitted[first:last] = clip[first - start : last - start]
    return fitted


def _transform(modality: AudioModality, samples: Float64[np.ndarray, " length"]) -> Complex128[np.ndarray, "frequency frame"]:
    """Short-time Fourier transform. Frame t is centred on sample t * hop; there are zeros beyond both ends."""
    window, half = modality.window, modality.window // 2
    padded = np.zeros(modality.samples + 2 * window)
    padded[half : half + len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: modality.frames * modality.hop : modality.hop]
    return np.fft.rfft(frames[: modality.frames] * _hann(window), axis=1).T


def _inverse_transform(
    modality: AudioModality, spectrum: Complex128[np.ndarray, "frequency frame"]
) -> Float64[np.ndarray, " length"]:
    """The samples whose transform is nearest to a spectrum in least squares (Griffin & Lim 1984, equation 6)."""
    weight = _weights(modality)
    added = _overlap_add(modality, np.fft.irfft(spectrum.T, modality.window, axis=1) * _hann(modality.window))
    return np.where(weight > 1e-8, added / np.maximum(weight, 1e-8), 0)


def _overlap_add(modality: AudioModality, frames: Float64[np.ndarray, "frame window"]) -> Float64[np.ndarray, " length"]:
    """The sum of all frames at their places."""
    window, half = modality.window, modality.window // 2
    added = np.zeros(modality.samples + 2 * window)
    for index, frame in enumerate(frames):
        start = index * modality.hop
        added[start : start + window] += frame
    return added[half : half + modality.samples]


def _invert_filters(modality: AudioModality, mel: Float64[np.ndarray, "mel frame"]) -> Float64[np.ndarray, "frequency frame"]:
    """A power spectrum, nowhere negative, that the filters turn into a mel spectrum, approximately."""
    filters = _filters(modality)
    target: NDArray[np.float64] = filters.T @ mel
    power = target + 1e-12
    gram = filters.T @ filters
    for _ in range(_INVERSION_STEPS):
        power *= target / np.maximum(gram @ power, 1e-12)
    return power


@lru_cache(maxsize=16)
def _hann(window: int) -> NDArray[np.float64]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


@lru_cache(maxsize=16)
def _weights(modality: AudioModality) -> Float64[np.ndarray, " length"]:
    """The sum of the squared windows over each sample."""
    return _overlap_add(modality, np.tile(_hann(modality.window) ** 2, (modality.frames, 1)))


@lru_cache(maxsize=16)
def _filters(modality: AudioModality) -> Float64[np.ndarray, "mel frequency"]:
    """Triangular filters, equally spaced on the mel scale from 0 Hz to half the sample rate, each with its peak at 1."""
    edges = modality.band_edges
    frequencies = np.arange(modality.window // 2 + 1) * (modality.sample_rate / modality.window)
    low, peak, high = edges[:-2, np.newaxis], edges[1:-1, np.newaxis], edges[2:, np.newaxis]
    rising, falling = (frequencies - low) / (peak - low), (high - frequencies) / (high - peak)
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    return filters
