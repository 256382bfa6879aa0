"""Read any recording as 16 kHz mono float32, or say why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2pasr.errors import LocalError

SAMPLE_RATE = 16_000
"""Hz. Every model this library trains was built for it."""

MIN_SECONDS = 0.5
"""Shorter clips hold no phrase and make CTC and attention degenerate."""

SILENCE_PEAK = 10 ** (-50 / 20)
"""A clip whose loudest sample is below -50 dBFS holds no speech."""

CLIPPED_SHARE = 0.01
"""Share of samples at full scale from which a clip counts as distorted by clipping."""

FULL_SCALE = 0.9995
"""Magnitude, of 1.0, from which a sample counts as being at full scale."""

LIBSNDFILE_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})
PYAV_SUFFIXES = frozenset({".m4a", ".mp4", ".aac", ".webm", ".mkv", ".mov", ".3gp"})

Audio = npt.NDArray[np.float32]
"""Mono samples in [-1, 1], shape (samples,), at :data:`SAMPLE_RATE` unless a name says otherwise."""


class RefusedClip(LocalError):
    """A recording that cannot be trained on; the message is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class ClipLimits:
    """What a clip must satisfy to enter a shard.

    Args:
        window_seconds: the longest clip the run's model hears at once, in seconds.
    """

    window_seconds: float
    min_seconds: float = MIN_SECONDS
    silence_peak: float = SILENCE_PEAK
    clipped_share: float = CLIPPED_SHARE


def read_clip(path: Path, limits: ClipLimits) -> Audio:
    """Decode, mix down, resample and check one recording.

    Args:
        path: a file that libsndfile (WAV, FLAC, MP3, OGG/Opus) or FFmpeg (M4A and video) can read,
            at any sampling rate and channel count.
        limits: what to refuse.

    Returns:
        float32 samples, shape (samples,), 16 kHz mono, in [-1, 1].

    Raises:
        RefusedClip: with the reason, for files that are missing, unreadable, too short, too long,
            silent or clipped. At most a second more than the window is ever decoded.
    """
    try:
        exists = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise RefusedClip(f"it cannot be opened ({error.strerror})") from error
    if not exists:
        raise RefusedClip("the file does not exist")
    native, rate = _decode(path, limits.window_seconds + 1.0)
    seconds = len(native) / rate
    if seconds < limits.min_seconds:
        raise RefusedClip(f"{seconds:.2f} s is shorter than {limits.min_seconds:g} s")
    if seconds > limits.window_seconds:
        raise RefusedClip(f"it is longer than the window of {limits.window_seconds:g} s")
    if not np.isfinite(native).all():
        raise RefusedClip("it holds samples that are not numbers")
    magnitude = np.abs(native)
    if magnitude.max() < limits.silence_peak:
        raise RefusedClip("it is silent")
    clipped = float(np.mean(magnitude >= FULL_SCALE))
    if clipped > limits.clipped_share:
        raise RefusedClip(f"it is clipped: {clipped:.1%} of the samples are at full scale")
    return resample(native, rate)


def resample(audio: Audio, rate: int) -> Audio:
    """Resample mono audio from `rate` Hz to 16 kHz with soxr's high-quality filter."""
    if rate == SAMPLE_RATE:
        return audio.astype(np.float32, copy=False)
    soxr = _require("soxr")
    return np.asarray(soxr.resample(audio, rate, SAMPLE_RATE, quality="HQ"), dtype=np.float32)


def _decode(path: Path, max_seconds: float) -> tuple[Audio, int]:
    suffix = path.suffix.lower()
    if suffix in LIBSNDFILE_SUFFIXES:
        return _decode_libsndfile(path, max_seconds)
    if suffix in PYAV_SUFFIXES:
        return _decode_pyav(path, max_seconds)
    known = " ".join(sorted(LIBSNDFILE_SUFFIXES | PYAV_SUFFIXES))
    raise RefusedClip(f"the format {suffix or '(no suffix)'} is not one of {known}")


def _decode_libsndfile(path: Path, max_seconds: float) -> tuple[Audio, int]:
    soundfile = _require("soundfile")
    try:
        with soundfile.SoundFile(path) as sound:
            rate = int(sound.samplerate)
            frames = sound.read(int(max_seconds * rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise RefusedClip(f"it cannot be decoded ({error.error_string})") from error
    return np.ascontiguousarray(frames.mean(axis=1, dtype=np.float32)), rate


def _decode_pyav(path: Path, max_seconds: float) -> tuple[Audio, int]:
    av = _require("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise RefusedClip("it has no audio track")
            stream = container.streams.audio[0]
            to_planes = av.AudioResampler(format="fltp")
            pieces: list[Audio] = []
            seconds = 0.0
            for frame in container.decode(stream):
                for planes in to_planes.resample(frame):
                    # Not mixed by FFmpeg, whose stereo comes out 3 dB louder than the mean of its channels.
                    pieces.append(planes.to_ndarray().mean(axis=0, dtype=np.float32))
                    rate = int(planes.sample_rate)
                    seconds += planes.samples / rate
                if seconds > max_seconds:
                    break
    except (av.FFmpegError, ValueError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else error
        raise RefusedClip(f"it cannot be decoded ({reason})") from error
    if not pieces:
        raise RefusedClip("it holds no audio")
    return np.concatenate(pieces), rate


def _require(module: str) -> Any:
    """Import an optional audio library, or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LocalError(f"reading recordings needs {module}: pip install 'p2pasr[audio]'") from error
