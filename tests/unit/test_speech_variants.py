"""Variants of a recording: the same for the same seed, within the window, and as far from it as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pasr.speech.audio import FULL_SCALE, SAMPLE_RATE
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.shards import read_shard
from p2pasr.speech.variants import SPEEDS, at_speed, louder, noisy, reverberant, variant

from .conftest import MODEL, recordings, tone

NOTE = tone(1.0)


def power(audio: np.ndarray) -> float:
    return float(np.mean(np.square(audio, dtype=np.float64)))


@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=1, max_size=8), st.floats(0.5, 3.0), st.floats(0.5, 3.0))
def test_a_variant_is_the_same_again_finite_unclipped_and_no_longer_than_the_window(
    seed: bytes, seconds: float, window: float
) -> None:
    audio = tone(min(seconds, window))
    made = variant(audio, seed, window)

    assert made.tobytes() == variant(audio, seed, window).tobytes()
    assert made.dtype == np.float32
    assert np.isfinite(made).all()
    assert 0 < np.abs(made).max() < FULL_SCALE
    assert len(made) <= round(window * SAMPLE_RATE)
    assert any(abs(len(made) - len(audio) / speed) <= 2 for speed in SPEEDS)


def test_seeds_give_variants_of_their_own() -> None:
    assert len({variant(NOTE, bytes([number]), 3.0).tobytes() for number in range(20)}) == 20


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_another_pace_moves_length_and_pitch_together(speed: float) -> None:
    made = at_speed(NOTE, speed)
    loudest = int(np.argmax(np.abs(np.fft.rfft(made)))) * SAMPLE_RATE / len(made)

    assert len(made) == pytest.approx(len(NOTE) / speed, abs=2)
    assert loudest == pytest.approx(440 * speed, rel=0.01)


@given(st.floats(10, 30), st.integers(0, 100))
def test_noise_is_as_far_below_the_recording_as_is_said(decibels: float, seed: int) -> None:
    noise = noisy(NOTE, decibels, np.random.default_rng(seed)) - NOTE

    assert 10 * np.log10(power(NOTE) / power(noise)) == pytest.approx(decibels, abs=0.01)


def test_an_echo_follows_its_sound_and_dies_away() -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[1000] = 1.0
    heard = reverberant(click, np.random.default_rng(0))

    assert np.abs(heard[:1000]).max() < 1e-5
    assert heard[1000] == pytest.approx(1.0, abs=1e-3)
    assert power(heard[1001:2600]) > 100 * power(heard[6000:7600])


@given(st.floats(-20, 20))
def test_gain_stops_before_it_clips(decibels: float) -> None:
    made = louder(NOTE, decibels)

    assert np.abs(made).max() <= 0.99 * FULL_SCALE + 1e-6
    if np.abs(NOTE).max() * 10 ** (decibels / 20) < 0.9:
        assert 10 * np.log10(power(made) / power(NOTE)) == pytest.approx(decibels, abs=0.01)


def test_shards_hold_each_recording_and_its_variants(tmp_path: Path) -> None:
    rows = [{"audio": f"{number}.wav", "text": "我想喝水", "speaker": "a"} for number in range(3)]
    source = recordings(tmp_path / "in", rows)
    plain = prepare(source, tmp_path / "plain", Settings(MODEL))
    made = prepare(source, tmp_path / "made", Settings(MODEL, variants=2))
    again = prepare(source, tmp_path / "made", Settings(MODEL, variants=2))

    assert (plain.clips, made.clips) == (3, 9)
    assert [shard.digest for shard in again.shards] == [shard.digest for shard in made.shards]
    clips = read_shard(tmp_path / "made" / made.shards[0].file).clips
    (first,) = [read_shard(tmp_path / "plain" / shard.file).clips[0] for shard in plain.shards]
    assert np.array_equal(clips[0].mel, first.mel)
    assert {clip.tokens for clip in clips} == {first.tokens}
    assert not any(clip.mel.shape == first.mel.shape and np.array_equal(clip.mel, first.mel) for clip in clips[1:])
