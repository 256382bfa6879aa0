"""Log-mel features at a clip's true length, exactly restorable to the padded input of the model.

Whisper pads every clip to its window (30 s) before the spectrogram, so a phrase of three seconds
costs ten times its length in time and bytes. Here the spectrogram is taken over the clip and just
enough zeros that its last frame lies wholly in them. That frame holds what every padding frame
would hold – the floor that the extractor's `max - 8` clamp sets – and repeating it rebuilds the
padded spectrogram bit for bit, in float32 as in float16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from p2pasr.speech.audio import Audio

if TYPE_CHECKING:
    import torch
    from transformers import WhisperFeatureExtractor

HALF_WINDOW = 200
"""Samples: half of Whisper's 400-sample analysis window, which reaches past the end of the clip."""

HOP = 160
"""Samples between two frames: 10 ms at 16 kHz."""

Mel = npt.NDArray[np.float16]
"""Log-mel features, shape (n_mels, frames), float16, normalised as Whisper's extractor does."""


def log_mel(audio: Audio, extractor: WhisperFeatureExtractor) -> Mel:
    """Features of one clip at its true length, the last frame being padding.

    Args:
        audio: float32, shape (samples,), 16 kHz mono, no longer than the extractor's window.
        extractor: the feature extractor of the model that will be trained.

    Returns:
        float16, shape (n_mels, frames) with `frames` about samples / 160 + 2.
    """
    return np.asarray(spectrogram(audio, extractor).half().numpy())


def spectrogram(audio: Audio, extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """The same before rounding: float32, shape (n_mels, frames).

    It is what the extractor computes, operation by operation and so bit by bit, without all that it
    does around it, which for a short clip takes longer.
    """
    import torch  # here, for commands that only look at shards should start at once

    hops_to_silence = -(-(len(audio) + HALF_WINDOW) // HOP)
    padded = torch.zeros(max(min((hops_to_silence + 1) * HOP, extractor.n_samples), len(audio)))
    padded[: len(audio)] = torch.from_numpy(audio)
    window, filters = _tables(extractor)
    spectrum = torch.stft(
        padded[: extractor.n_samples], extractor.n_fft, extractor.hop_length, window=window, return_complex=True
    )
    powers = (spectrum[..., :-1].abs() ** 2).contiguous()
    logs = torch.clamp(filters.T @ powers, min=1e-10).log10()
    return (torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0


@lru_cache(maxsize=8)
def _tables(extractor: WhisperFeatureExtractor) -> tuple[torch.Tensor, torch.Tensor]:
    """An extractor's analysis window, and its mel filters, float32, shape (n_fft / 2 + 1, n_mels)."""
    import torch

    return torch.hann_window(extractor.n_fft), torch.from_numpy(extractor.mel_filters).to(torch.float32)


def restore(mel: npt.NDArray[np.floating], frames: int) -> npt.NDArray[np.floating]:
    """Rebuild the features of the padded clip.

    Args:
        mel: shape (n_mels, true frames), as :func:`log_mel` returns.
        frames: frames of the model's window, at least as many as `mel` has.

    Returns:
        Same dtype, shape (n_mels, frames); equal, bit for bit, to what the extractor gives for the
        same clip padded to `frames` hops and rounded to this dtype.
    """
    if mel.shape[1] > frames:
        raise ValueError(f"a clip of {mel.shape[1]} frames does not fit a window of {frames}")
    out = np.empty((mel.shape[0], frames), dtype=mel.dtype)
    out[:, : mel.shape[1]] = mel
    out[:, mel.shape[1] :] = mel[:, -1:]
    return out
