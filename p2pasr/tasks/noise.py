"""Sounds that are changed on purpose, so that what was changed is known exactly: noise, silence and masks.

All draws are torch's on the CPU, whatever the device, so that the caller's seed decides them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SPEECH_RANGE = 3.0
"""Powers of ten below a clip's loudest frame within which a frame counts as speech: 30 dB."""

DYNAMIC_RANGE = 2.0
"""What Whisper's extractor leaves of a clip's range, in units of its log-mels (8 powers of ten)."""

QUIETEST = -1.5
"""The log-mel of digital silence in Whisper's units: 10⁻¹⁰."""


@dataclass(frozen=True, slots=True)
class NoisySound:
    """A clip between silences, some of it under noise.

    Attributes:
        mel: float32, (n_mels, frames).
        speech: bool, (frames,), where the clip itself was loud.
        noise: bool, (frames,), where noise was added.
    """

    mel: Tensor
    speech: Tensor
    noise: Tensor


def loudness(mel: Tensor) -> Tensor:
    """Power of each frame of log-mels in Whisper's units, (n_mels, frames), as its logarithm to base 10."""
    return powers(mel).mean(0).log10()


def powers(mel: Tensor) -> Tensor:
    """What log-mels in Whisper's units, (log₁₀ power + 4) / 4, are the logarithm of."""
    return torch.pow(10.0, 4 * mel - 4)


def speech_frames(mel: Tensor) -> Tensor:
    """Bool, (frames,): frames of a clip within 30 dB of its loudest."""
    loud = loudness(mel)
    return loud > loud.max() - SPEECH_RANGE


def make_noisy(mel: Tensor, most_padding: int, quietest_snr: float, loudest_snr: float) -> NoisySound:
    """Put up to `most_padding` frames of silence around a clip and noise over about half of the result.

    The noise is stationary: a spectrum that drifts from band to band, and in each frame and band the exponential
    spread of a periodogram about it.

    Args:
        mel: float32, (n_mels, frames), in Whisper's units.
        most_padding: frames before and behind the clip at most, each drawn.
        quietest_snr, loudest_snr: range of the ratio of the clip's loudest frame to the noise, in dB.
    """
    bands, frames = mel.shape
    before, behind = (torch.rand(2) * (most_padding + 1)).long().tolist()
    sound = pad(mel, (before, behind), value=QUIETEST)
    total = before + frames + behind
    length = max(1, int(total * (0.25 + 0.5 * torch.rand(1).item())))
    start = int(torch.rand(1).item() * (total - length + 1))
    noise = torch.zeros(total, dtype=torch.bool)
    noise[start : start + length] = True
    snr = quietest_snr + (loudest_snr - quietest_snr) * torch.rand(1).item()
    drift = 0.3 * torch.randn(bands).cumsum(0)
    level = loudness(mel).max() - snr / 10
    spectrum = torch.pow(10.0, level + drift - torch.pow(10.0, drift).mean().log10())
    added = -spectrum[:, None] * torch.log(torch.rand(bands, total).clamp_min(1e-7)) * noise
    logs = ((powers(sound) + added).log10() + 4) / 4
    mixed = torch.maximum(logs, logs.max() - DYNAMIC_RANGE)
    return NoisySound(mixed, pad(speech_frames(mel), (before, behind)), noise)


def span_mask(frames: int, share: float, span: int) -> Tensor:
    """Bool, (frames,): spans drawn so that they do not overlap and cover about a share of the frames.

    Args:
        frames: at least 1.
        share: of the frames, in (0, 1]; at least one span is masked.
        span: frames of one span; the whole clip if that is shorter.
    """
    span = min(span, frames)
    count = min(max(1, round(share * frames / span)), frames // span)
    slots = torch.randperm(frames - count * (span - 1))[:count].sort().values
    starts = slots + torch.arange(count) * (span - 1)
    masked = torch.zeros(frames, dtype=torch.bool)
    masked[(starts[:, None] + torch.arange(span)).flatten()] = True
    return masked


def pooled(labels: Tensor, frames: int) -> Tensor:
    """Bool, (⌈labels / frames⌉,): whether at least half of each run of this many labels is True."""
    positions = math.ceil(len(labels) / frames)
    padded = pad(labels.float(), (0, positions * frames - len(labels))).view(positions, frames).sum(1)
    sizes = pad(torch.ones(len(labels)), (0, positions * frames - len(labels))).view(positions, frames).sum(1)
    return padded * 2 >= sizes
