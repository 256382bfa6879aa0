"""Any recording becomes 16 kHz mono, or is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.speech.audio import (
    LIBSNDFILE_SUFFIXES,
    PYAV_SUFFIXES,
    SAMPLE_RATE,
    Audio,
    ClipLimits,
    RefusedClip,
    read_clip,
    resample,
)

from .conftest import tone

LIMITS = ClipLimits(window_seconds=3.0)

Writer = Callable[[Path, Audio, int], None]


def with_soundfile(container: str, subtype: str) -> Writer:
    return lambda path, audio, rate: soundfile.write(path, audio, rate, format=container, subtype=subtype)


def with_ffmpeg(codec: str) -> Writer:
    def write(path: Path, audio: Audio, rate: int) -> None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.layout = "mono" if audio.ndim == 1 else "stereo"
            planes = np.ascontiguousarray(np.atleast_2d(audio.T))
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=stream.layout.name)
            frame.sample_rate = rate
            frame.time_base = Fraction(1, rate)
            to_codec = av.AudioResampler(format=stream.format.name, layout=stream.layout.name, rate=rate)
            for piece in [*to_codec.resample(frame), *to_codec.resample(None)]:
                container.mux(stream.encode(piece))
            container.mux(stream.encode(None))

    return write


LOSSLESS: dict[str, Writer] = {
    "pcm16.wav": with_soundfile("WAV", "PCM_16"),
    "pcm24.wav": with_soundfile("WAV", "PCM_24"),
    "float.wav": with_soundfile("WAV", "FLOAT"),
    "CAPITALS.WAV": with_soundfile("WAV", "PCM_16"),
    "a.flac": with_soundfile("FLAC", "PCM_16"),
    "a.mka.mkv": with_ffmpeg("pcm_s16le"),
}
LOSSY: dict[str, Writer] = {
    "a.mp3": with_soundfile("MP3", "MPEG_LAYER_III"),
    "a.ogg": with_soundfile("OGG", "VORBIS"),
    "a.opus": with_soundfile("OGG", "OPUS"),
    "a.m4a": with_ffmpeg("aac"),
    "a.mp4": with_ffmpeg("aac"),
    "a.aac": with_ffmpeg("aac"),
}


def loudest_hertz(audio: Audio) -> float:
    """Where the spectrum of 16 kHz audio has its peak."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / len(audio)


def written(path: Path, audio: Audio, rate: int = SAMPLE_RATE) -> Path:
    soundfile.write(path, audio, rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_keep_length_and_content_at_any_rate(tmp_path: Path, name: str, rate: int) -> None:
    LOSSLESS[name](tmp_path / name, tone(1.25, rate), rate)

    audio = read_clip(tmp_path / name, LIMITS)

    assert (audio.dtype, audio.shape) == (np.float32, (20_000,))
    assert np.abs(audio - tone(1.25))[200:-200].max() < 0.002


@pytest.mark.parametrize(("name", "rate"), [(name, rate) for name in LOSSY for rate in (16_000, 48_000)])
def test_lossy_formats_keep_about_their_length_and_what_is_heard(tmp_path: Path, name: str, rate: int) -> None:
    LOSSY[name](tmp_path / name, tone(1.25, rate), rate)

    audio = read_clip(tmp_path / name, LIMITS)

    assert audio.dtype == np.float32
    assert 1.25 <= len(audio) / SAMPLE_RATE < 1.45  # encoders pad to whole frames
    assert loudest_hertz(audio[2000:18000]) == pytest.approx(440, abs=2)
    assert np.sqrt(np.mean(audio[2000:18000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_stereo_is_mixed_to_the_mean_of_its_channels(tmp_path: Path, name: str) -> None:
    left, right = tone(1.0, hertz=440, peak=0.4), tone(1.0, hertz=1000, peak=0.2)
    write = with_ffmpeg("aac") if name.endswith("m4a") else with_soundfile("WAV", "PCM_16")
    write(tmp_path / name, np.stack([left, right], axis=1), SAMPLE_RATE)

    audio = read_clip(tmp_path / name, LIMITS)[2000:14000]

    magnitudes = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) * 4 / len(audio)
    assert magnitudes[round(440 * len(audio) / SAMPLE_RATE)] == pytest.approx(0.2, abs=0.02)
    assert magnitudes[round(1000 * len(audio) / SAMPLE_RATE)] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_mixing_down_a_loud_stereo_recording_does_not_clip_it(tmp_path: Path, name: str) -> None:
    note = tone(1.0, peak=0.9)
    write = with_ffmpeg("aac") if name.endswith("m4a") else with_soundfile("WAV", "PCM_16")
    write(tmp_path / name, np.stack([note, note], axis=1), SAMPLE_RATE)

    audio = read_clip(tmp_path / name, LIMITS)

    assert np.sqrt(np.mean(audio[2000:14000] ** 2)) == pytest.approx(0.9 / np.sqrt(2), rel=0.05)


def test_channels_that_cancel_out_are_silence(tmp_path: Path) -> None:
    note = tone(1.0)

    with pytest.raises(RefusedClip, match="silent"):
        read_clip(written(tmp_path / "a.wav", np.stack([note, -note], axis=1)), LIMITS)


@given(samples=st.integers(4_000, 60_000), rate=st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000, 96_000]))
def test_resampling_keeps_the_duration_to_within_one_sample(samples: int, rate: int) -> None:
    audio = resample(np.ones(samples, np.float32), rate)

    assert audio.dtype == np.float32
    assert abs(len(audio) - samples * SAMPLE_RATE / rate) < 1


def test_audio_at_16_khz_is_not_touched() -> None:
    audio = tone(0.5)

    assert resample(audio, SAMPLE_RATE) is audio


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_a_clip_exactly_at_a_limit_is_accepted(tmp_path: Path, seconds: float, rate: int) -> None:
    audio = read_clip(written(tmp_path / "a.wav", tone(seconds, rate), rate), LIMITS)

    assert len(audio) == seconds * SAMPLE_RATE


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (7_999, "0.50 s is shorter than 0.5 s"),
        (100, "0.01 s is shorter than 0.5 s"),
        (0, "0.00 s is shorter than 0.5 s"),
        (48_001, "it is longer than the window of 3 s"),
        (480_000, "it is longer than the window of 3 s"),
    ],
)
def test_a_clip_one_sample_beyond_a_limit_is_refused(tmp_path: Path, samples: int, reason: str) -> None:
    path = written(tmp_path / "a.wav", tone(samples / SAMPLE_RATE))

    with pytest.raises(RefusedClip) as refused:
        read_clip(path, LIMITS)
    assert str(refused.value) == reason


def test_a_compressed_clip_longer_than_the_window_is_refused(tmp_path: Path) -> None:
    LOSSY["a.m4a"](tmp_path / "a.m4a", tone(5.0), SAMPLE_RATE)

    with pytest.raises(RefusedClip, match=r"longer than the window of 3 s"):
        read_clip(tmp_path / "a.m4a", LIMITS)


@pytest.mark.parametrize("peak", [0.0, 1e-6, 0.003])
def test_a_silent_recording_is_refused(tmp_path: Path, peak: float) -> None:
    with pytest.raises(RefusedClip, match="it is silent"):
        read_clip(written(tmp_path / "a.wav", tone(1.0, peak=peak)), LIMITS)


def test_a_quiet_recording_is_not_silent(tmp_path: Path) -> None:
    assert len(read_clip(written(tmp_path / "a.wav", tone(1.0, peak=0.0033)), LIMITS)) == SAMPLE_RATE


def clipped(share: float, sign: int = 1) -> Audio:
    audio = tone(1.0)
    audio[: int(share * len(audio))] = sign * 1.0
    return audio


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clipped_recording_is_refused_with_the_share_that_is(tmp_path: Path, sign: int) -> None:
    with pytest.raises(RefusedClip, match=r"it is clipped: 2\.0% of the samples are at full scale"):
        read_clip(written(tmp_path / "a.wav", clipped(0.02, sign)), LIMITS)


def test_a_few_samples_at_full_scale_are_let_pass(tmp_path: Path) -> None:
    audio = read_clip(written(tmp_path / "a.wav", clipped(0.01)), LIMITS)

    assert audio.max() == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    audio = tone(1.0)
    audio[777] = value

    with pytest.raises(RefusedClip, match="not numbers"):
        read_clip(written(tmp_path / "a.wav", audio), LIMITS)


# --- files --------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedClip, match="the file does not exist"):
        read_clip(tmp_path / "a.wav", LIMITS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 300 + ".wav", "it cannot be opened (File name too long)"),
        ("a\0.wav", "the file does not exist"),
        ("loop.wav", "the file does not exist"),
        ("dangling.wav", "the file does not exist"),
    ],
    ids=["too long", "a zero byte", "a link to itself", "a link to nothing"],
)
def test_a_name_that_leads_to_no_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("nothing.wav")

    with pytest.raises(RefusedClip) as refused:
        read_clip(tmp_path / name, LIMITS)
    assert str(refused.value) == reason


def test_a_link_to_a_recording_is_read(tmp_path: Path) -> None:
    (tmp_path / "link.wav").symlink_to(written(tmp_path / "a.wav", tone(1.0)))

    assert len(read_clip(tmp_path / "link.wav", LIMITS)) == SAMPLE_RATE


@pytest.mark.parametrize("rate", [0, 1, 2**31 - 1, 2**32 - 1])
def test_a_header_that_names_an_impossible_rate_is_refused(tmp_path: Path, rate: int) -> None:
    data = bytearray(written(tmp_path / "a.wav", tone(1.0)).read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)

    with pytest.raises(RefusedClip):
        read_clip(tmp_path / "a.wav", LIMITS)


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100])
def test_an_mp3_of_any_rate_is_read(tmp_path: Path, rate: int) -> None:
    LOSSY["a.mp3"](tmp_path / "a.mp3", tone(1.25, rate), rate)

    assert loudest_hertz(read_clip(tmp_path / "a.mp3", LIMITS)[2000:18000]) == pytest.approx(440, abs=2)


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "a.wav").mkdir()

    with pytest.raises(RefusedClip, match="the file does not exist"):
        read_clip(tmp_path / "a.wav", LIMITS)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"no recording at all " * 500], ids=["empty", "zeros", "text"])
@pytest.mark.parametrize("suffix", sorted(LIBSNDFILE_SUFFIXES | PYAV_SUFFIXES))
def test_a_file_of_garbage_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)

    with pytest.raises(RefusedClip, match=r"it cannot be decoded \(|it has no audio track|it holds no audio"):
        read_clip(path, LIMITS)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_a_recording_cut_short_is_read_as_far_as_it_goes_or_refused(tmp_path: Path, name: str) -> None:
    (LOSSLESS | LOSSY)[name](tmp_path / name, tone(2.0), SAMPLE_RATE)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 8])

    try:
        audio = read_clip(tmp_path / name, LIMITS)
    except RefusedClip:
        return
    assert len(audio) < 2.2 * SAMPLE_RATE
    assert np.isfinite(audio).all()


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(24):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))

    with pytest.raises(RefusedClip, match="it has no audio track"):
        read_clip(tmp_path / "a.mp4", LIMITS)


@pytest.mark.parametrize(("name", "what"), [("a.txt", r"\.txt"), ("a.wav.bak", r"\.bak"), ("a", r"\(no suffix\)")])
def test_an_unknown_format_is_refused_naming_the_known_ones(tmp_path: Path, name: str, what: str) -> None:
    written(tmp_path / "real.wav", tone(1.0)).rename(tmp_path / name)

    with pytest.raises(RefusedClip, match=rf"the format {what} is not one of .*\.flac .*\.m4a .*\.wav"):
        read_clip(tmp_path / name, LIMITS)


@pytest.mark.parametrize("suffix", [".wav", ".m4a"])
def test_a_refusal_does_not_repeat_the_files_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"grandmother{suffix}"
    path.write_bytes(b"no recording")

    with pytest.raises(RefusedClip) as refused:
        read_clip(path, LIMITS)
    assert "grandmother" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_a_refused_clip_is_an_error_of_this_machine() -> None:
    assert issubclass(RefusedClip, LocalError)
