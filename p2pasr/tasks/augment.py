"""SpecAugment: stretches of frequency and of time that training cannot see (Park et al. 2019), without time warping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class SpecAugment(BaseModel):
    """The `spec_augment` section of a task's configuration. The widths are drawn from zero to these."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    frequency_masks: Annotated[int, Field(ge=0, le=64)] = 2
    """Stretches of mel bands that are hidden."""
    frequency_bins: Annotated[int, Field(ge=1, le=128)] = 27
    """Mel bands that one mask covers at most."""
    time_masks: Annotated[int, Field(ge=0, le=64)] = 2
    """Stretches of time that are hidden."""
    time_frames: Annotated[int, Field(ge=1, le=3000)] = 100
    """Frames of 10 ms that one mask covers at most."""
    time_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of a clip that one mask covers at most, so that short clips keep some speech."""


def masks(lengths: Sequence[int], bins: int, config: SpecAugment) -> tuple[Tensor, Tensor]:
    """Draw what to hide of each clip, from torch's CPU generator wherever the features lie.

    Args:
        lengths: true frames of each clip.
        bins: mel bands.

    Returns:
        bool, (batch, bins) and bool, (batch, longest of `lengths`): true where it is hidden.
    """
    frequency = torch.zeros(len(lengths), bins, dtype=torch.bool)
    time = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        for _ in range(config.frequency_masks):
            frequency[row, _span(bins, min(config.frequency_bins, bins))] = True
        for _ in range(config.time_masks):
            time[row, _span(length, min(config.time_frames, int(config.time_share * length)))] = True
    return frequency, time


def spec_augment(features: Tensor, lengths: Sequence[int], config: SpecAugment) -> Tensor:
    """Replace what :func:`masks` draws by each clip's mean.

    Args:
        features: float32, (batch, bins, frames), padded behind each clip.
        lengths: true frames of each clip, at most `frames`; padding is neither counted nor changed.

    Returns:
        A new tensor of the same shape.
    """
    frequency, time = masks(lengths, features.shape[1], config)
    out = features.clone()
    for row, length in enumerate(lengths):
        hidden = frequency[row, :, None] | time[row, None, :length]
        clip = out[row, :, :length]
        clip[hidden.to(features.device)] = clip.mean()
    return out


def _span(size: int, widest: int) -> slice:
    width = int(torch.randint(0, widest + 1, ()))
    start = int(torch.randint(0, size - width + 1, ()))
    return slice(start, start + width)
