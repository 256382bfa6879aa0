"""Variants of a recording to train on: faster and slower, in rooms, in noise, louder and softer.

They are made when shards are, for shards hold features and not sound; held-out recordings are prepared
without. What is drawn follows from a seed, so that the same recordings give the same shards.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from p2pasr.protocol.encoding import keyed_bytes
from p2pasr.speech.audio import FULL_SCALE, SAMPLE_RATE, Audio, resample

SPEEDS: Final = (0.9, 1.0, 1.1)
"""Pitch and pace together (Ko et al. 2015)."""

SNR_DECIBELS: Final = (10.0, 30.0)
GAIN_DECIBELS: Final = (-8.0, 8.0)
REVERBERATION_SECONDS: Final = (0.1, 0.4)
"""Time in which a room's echo falls by 60 dB."""

ECHO_SHARE: Final = (0.05, 0.3)
"""Energy of the echo, as a share of the direct sound's."""

HALF: Final = 0.5
"""How often a variant is in a room, and how often in noise."""


def variant(audio: Audio, seed: bytes, window_seconds: float) -> Audio:
    """One variant of a recording, at 16 kHz.

    Args:
        seed: what is drawn follows from it.
        window_seconds: no variant is longer; a recording that would be is not slowed down.

    Returns:
        float32 samples, in [-1, 1].
    """
    dice = np.random.Generator(np.random.PCG64(int.from_bytes(keyed_bytes(seed + b"variant", 16), "big")))
    speed = float(dice.choice([s for s in SPEEDS if len(audio) <= s * window_seconds * SAMPLE_RATE] or [1.0]))
    in_room, in_noise = dice.random(2) < HALF
    out = at_speed(audio, speed)
    if in_room:
        out = reverberant(out, dice)
    if in_noise:
        out = noisy(out, dice.uniform(*SNR_DECIBELS), dice)
    return louder(out, dice.uniform(*GAIN_DECIBELS))[: round(window_seconds * SAMPLE_RATE)]


def at_speed(audio: Audio, speed: float) -> Audio:
    """Faster (above 1) or slower, with its pitch."""
    return audio if speed == 1 else resample(audio, round(SAMPLE_RATE * speed))


def noisy(audio: Audio, decibels: float, dice: np.random.Generator) -> Audio:
    """With pink noise, so many decibels below the recording's mean power."""
    spectrum = np.fft.rfft(dice.standard_normal(len(audio)))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, n=len(audio))
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    scale = np.sqrt(power / 10 ** (decibels / 10) / np.mean(np.square(noise)))
    return np.asarray(audio + scale * noise, dtype=np.float32)


def reverberant(audio: Audio, dice: np.random.Generator) -> Audio:
    """In a room whose echo is noise that dies away; its energy and its length are drawn."""
    seconds, share = dice.uniform(*REVERBERATION_SECONDS), dice.uniform(*ECHO_SHARE)
    times = np.arange(1, round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    echo = dice.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    response = np.concatenate([[1.0], echo * np.sqrt(share / np.sum(np.square(echo)))])
    size = len(audio) + len(response) - 1
    heard = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(response, size), n=size)
    return np.asarray(heard[: len(audio)], dtype=np.float32)


def louder(audio: Audio, decibels: float) -> Audio:
    """By so many decibels, or as far as it goes without clipping."""
    gain, peak = 10 ** (decibels / 20), float(np.abs(audio).max())
    return np.asarray(audio * min(gain, 0.99 * FULL_SCALE / peak if peak > 0 else gain), dtype=np.float32)
