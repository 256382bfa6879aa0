"""Log-mel features at a clip's true length, exactly restorable to the padded input of the model.

Whisper pads every clip to its window (30 s) before the spectrogram, so a phrase of three seconds
costs ten times its length in time and bytes. Here the spectrogram is taken over the clip and just
enough zeros that its last frame lies wholly in them. That frame holds what every padding frame
would hold – the floor that the extractor's `max - 8` clamp sets – and repeating it rebuilds the
padded spectrogram bit for bit, in float32 as in float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from p2pasr.speech.audio import SAMPLE_RATE, Audio

if TYPE_CHECKING:
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
    window = int(extractor.n_samples)
    hops_to_silence = -(-(len(audio) + HALF_WINDOW) // HOP)
    length = min((hops_to_silence + 1) * HOP, window)
    padded = np.zeros(max(length, len(audio)), dtype=np.float32)
    padded[: len(audio)] = audio
    features = extractor(
        padded[:window], sampling_rate=SAMPLE_RATE, padding="longest", truncation=False, return_tensors="np"
    )
    return np.asarray(features.input_features[0], dtype=np.float16)


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
