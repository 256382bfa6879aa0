"""Features at true length are exactly the features of the padded clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from p2pasr.speech.audio import SAMPLE_RATE, Audio
from p2pasr.speech.mel import HALF_WINDOW, HOP, log_mel, restore, spectrogram
from p2pasr.speech.pretrained import frontend

from .conftest import MODEL

SHORT = frontend(MODEL).extractor
WHOLE = WhisperFeatureExtractor()
LARGE = WhisperFeatureExtractor(feature_size=128)

WINDOW = int(SHORT.n_samples)
EDGES = (
    SAMPLE_RATE // 2,
    SAMPLE_RATE // 2 + 1,
    100 * HOP,
    100 * HOP - 1,
    100 * HOP + 1,
    100 * HOP - HALF_WINDOW,
    WINDOW - 2 * HOP,
    WINDOW - HOP - HALF_WINDOW,
    WINDOW - HOP - HALF_WINDOW + 1,
    WINDOW - HALF_WINDOW,
    WINDOW - HALF_WINDOW + 1,
    WINDOW - HOP,
    WINDOW - 1,
    WINDOW,
)


def clip(samples: int, seed: int, peak: float) -> Audio:
    """Noise that swells, with a stretch of digital silence, as speech has."""
    draw = np.random.default_rng(seed)
    audio = draw.standard_normal(samples) * np.linspace(0.1, 1.0, samples)
    audio[samples // 3 : samples // 2] = 0.0
    return (peak * audio / np.abs(audio).max()).astype(np.float32)


def padded(audio: Audio, extractor: WhisperFeatureExtractor) -> np.ndarray:
    """The features that Whisper trains on: the clip padded with zeros to the window, in float32."""
    features = extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="np")
    return np.asarray(features.input_features[0])


lengths = st.integers(SAMPLE_RATE // 2, WINDOW)
peaks = st.sampled_from([1.0, 0.3, 0.004])


@given(samples=lengths, seed=st.integers(0, 99), peak=peaks)
@example(samples=WINDOW, seed=0, peak=1.0)
@example(samples=WINDOW - 1, seed=0, peak=1.0)
def test_restored_features_equal_the_padded_ones_bit_for_bit(samples: int, seed: int, peak: float) -> None:
    audio = clip(samples, seed, peak)
    wanted = padded(audio, SHORT)

    restored = restore(log_mel(audio, SHORT), wanted.shape[1])

    assert restored.dtype == np.float16
    assert restored.tobytes() == wanted.astype(np.float16).tobytes()


@pytest.mark.parametrize("samples", EDGES)
def test_restored_features_equal_the_padded_ones_at_every_edge_in_float16_and_in_float32(samples: int) -> None:
    audio = clip(samples, samples, 0.5)
    wanted = padded(audio, SHORT)

    mel = log_mel(audio, SHORT)

    exact = spectrogram(audio, SHORT).numpy()
    assert exact.dtype == np.float32
    assert restore(exact, wanted.shape[1]).tobytes() == wanted.tobytes()
    assert restore(mel, wanted.shape[1]).tobytes() == wanted.astype(np.float16).tobytes()


@settings(max_examples=25)
@given(samples=lengths, seed=st.integers(0, 99), peak=peaks)
def test_the_same_holds_in_float32_before_rounding(samples: int, seed: int, peak: float) -> None:
    audio = clip(samples, seed, peak)

    exact = spectrogram(audio, SHORT).numpy()

    assert restore(exact, WINDOW // HOP).tobytes() == padded(audio, SHORT).tobytes()


@settings(max_examples=15)
@given(samples=st.integers(SAMPLE_RATE // 2, WHOLE.n_samples), seed=st.integers(0, 99))
@example(samples=WHOLE.n_samples, seed=0)
@example(samples=WHOLE.n_samples - 1, seed=0)
@example(samples=WHOLE.n_samples - HALF_WINDOW, seed=0)
@example(samples=SAMPLE_RATE // 2, seed=0)
def test_the_same_holds_for_the_window_of_thirty_seconds(samples: int, seed: int) -> None:
    audio = clip(samples, seed, 0.5)

    restored = restore(log_mel(audio, WHOLE), 3000)

    assert restored.tobytes() == padded(audio, WHOLE).astype(np.float16).tobytes()


def test_the_same_holds_for_128_mel_bands() -> None:
    audio = clip(50_000, 3, 0.5)

    restored = restore(log_mel(audio, LARGE), 3000)

    assert restored.shape == (128, 3000)
    assert restored.tobytes() == padded(audio, LARGE).astype(np.float16).tobytes()


@given(samples=st.integers(SAMPLE_RATE // 2, WINDOW - HOP - HALF_WINDOW))
def test_a_clip_costs_its_own_length_and_hardly_more(samples: int) -> None:
    bands, frames = log_mel(clip(samples, 0, 0.5), SHORT).shape

    assert bands == 80
    assert samples / HOP + 2 < frames < samples / HOP + 4


def test_a_clip_longer_than_the_window_is_cut_to_it() -> None:
    long = clip(WINDOW + 5000, 0, 0.5)

    assert log_mel(long, SHORT).tobytes() == log_mel(long[:WINDOW], SHORT).tobytes()


def test_features_that_fill_the_window_are_restored_as_they_are() -> None:
    mel = log_mel(clip(WINDOW, 0, 0.5), SHORT)

    assert restore(mel, mel.shape[1]).tobytes() == mel.tobytes()


def test_features_longer_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="301 frames does not fit a window of 300"):
        restore(np.zeros((80, 301), np.float16), 300)
