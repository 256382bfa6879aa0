"""Masks on features: how much they hide, and that a seed decides it all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.tasks.augment import SpecAugment, masks, spec_augment

configs = st.builds(
    SpecAugment,
    frequency_masks=st.integers(0, 4),
    frequency_bins=st.integers(1, 128),
    time_masks=st.integers(0, 4),
    time_frames=st.integers(1, 300),
    time_share=st.floats(0, 1),
)
clips = st.lists(st.integers(1, 400), min_size=1, max_size=4)


@given(configs, clips, st.integers(1, 128))
def test_no_more_is_hidden_than_the_configuration_allows(config: SpecAugment, lengths: list[int], bins: int) -> None:
    frequency, time = masks(lengths, bins, config)
    assert frequency.shape == (len(lengths), bins)
    assert time.shape == (len(lengths), max(lengths))
    assert all(frequency.sum(dim=1) <= config.frequency_masks * config.frequency_bins)
    for row, length in enumerate(lengths):
        assert time[row].sum() <= config.time_masks * min(config.time_frames, config.time_share * length)
        assert not time[row, length:].any()


@given(configs, clips, st.integers(0, 2**32))
def test_the_same_seed_hides_the_same(config: SpecAugment, lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    features = torch.randn(len(lengths), 8, max(lengths))
    drawn = []
    for _ in range(2):
        torch.manual_seed(seed)
        drawn.append(spec_augment(features, lengths, config))
    assert torch.equal(*drawn)


@given(configs, clips)
def test_what_is_hidden_is_the_clips_mean_and_all_else_stays(config: SpecAugment, lengths: list[int]) -> None:
    features = torch.randn(len(lengths), 8, max(lengths))
    before = features.clone()
    out = spec_augment(features, lengths, config)
    assert torch.equal(features, before)
    for row, length in enumerate(lengths):
        changed = out[row] != features[row]
        assert torch.equal(out[row][changed], features[row, :, :length].mean().expand(int(changed.sum())))
        assert not changed[:, length:].any()


def shares(lengths: Sequence[int], config: SpecAugment) -> tuple[float, float]:
    """The mean shares of frequency and of time that are hidden."""
    torch.manual_seed(0)
    frequency, time = masks(lengths, 80, config)
    return float(frequency.float().mean()), float(time.float().mean())


@pytest.mark.parametrize("masks_each", [1, 2])
def test_masks_hide_half_their_widest_on_average(masks_each: int) -> None:
    config = SpecAugment(
        frequency_masks=masks_each, frequency_bins=20, time_masks=masks_each, time_frames=300, time_share=0.2
    )
    frequency, time = shares([200] * 2000, config)
    once = 0.5 * 20 / 80, 0.5 * 0.2
    for share, alone in zip((frequency, time), once, strict=True):
        least = alone if masks_each == 1 else 1.5 * alone  # two masks may overlap
        assert 0.9 * least < share < 1.1 * masks_each * alone


def test_without_masks_nothing_changes_and_no_number_is_drawn() -> None:
    features = torch.randn(2, 8, 20)
    state = torch.get_rng_state()
    assert torch.equal(spec_augment(features, [20, 12], SpecAugment(frequency_masks=0, time_masks=0)), features)
    assert torch.equal(torch.get_rng_state(), state)
