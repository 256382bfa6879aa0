"""Sounds and transcripts that are changed on purpose: what is said about the change is true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.speech.pretrained import Frontend
from p2pasr.tasks.corruption import Unit, compared, continuing_ids, corrupt, units_of, untouched
from p2pasr.tasks.noise import DYNAMIC_RANGE, QUIETEST, make_noisy, pooled, span_mask, speech_frames

UNITS = st.lists(st.sampled_from([(1,), (2,), (3, 4), (5, 6, 7)]), max_size=8).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)


# --- sounds -------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.floats(0.01, 0.9), st.integers(1, 60), SEEDS)
def test_spans_do_not_overlap_and_cover_the_share(frames: int, share: float, span: int, seed: int) -> None:
    torch.manual_seed(seed)
    masked = span_mask(frames, share, span)

    length = min(span, frames)
    count = min(max(1, round(share * frames / length)), frames // length)
    assert masked.shape == (frames,)
    assert int(masked.sum()) == count * length


def test_every_frame_is_masked_sometimes() -> None:
    torch.manual_seed(0)
    often = torch.stack([span_mask(40, 0.15, 6) for _ in range(600)]).float().mean(0)
    assert often.min() > 0.02
    assert often.mean() == pytest.approx(0.15, abs=0.01)


def clip(frames: int = 60) -> torch.Tensor:
    """A loud middle between quiet ends."""
    mel = torch.full((8, frames), -0.5)
    mel[:, 20:40] = 1.0
    return mel


def test_speech_is_where_a_clip_is_within_thirty_decibels_of_its_loudest() -> None:
    mel = clip()
    mel[:, 40:45] = 1.0 - 0.74  # a unit is 40 dB
    mel[:, 45:50] = 1.0 - 0.76
    assert speech_frames(mel).nonzero().flatten().tolist() == list(range(20, 45))


@given(SEEDS)
def test_noise_changes_what_is_said_to_be_noisy_and_nothing_else(seed: int) -> None:
    torch.manual_seed(seed)
    made = make_noisy(clip(), 30, 0.0, 25.0)

    assert made.mel.shape[1] == len(made.speech) == len(made.noise)
    assert int(made.speech.sum()) == 20
    first = int(made.speech.nonzero()[0]) - 20
    before = torch.full_like(made.mel, QUIETEST)
    before[:, first : first + 60] = clip()
    floor = made.mel.max() - DYNAMIC_RANGE
    torch.testing.assert_close(made.mel[:, ~made.noise], before.clamp_min(floor)[:, ~made.noise], atol=1e-5, rtol=0)
    assert (made.mel[:, made.noise] >= before[:, made.noise] - 1e-5).all()
    assert 0.2 * len(made.noise) < int(made.noise.sum()) < 0.8 * len(made.noise)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 7))
def test_a_position_is_what_at_least_half_of_its_frames_are(labels: list[bool], frames: int) -> None:
    runs = [labels[start : start + frames] for start in range(0, len(labels), frames)]
    assert pooled(torch.tensor(labels), frames).tolist() == [2 * sum(run) >= len(run) for run in runs]


# --- transcripts --------------------------------------------------------------------------------


@given(UNITS, UNITS, SEEDS)
def test_a_corrupted_transcript_is_another_one_and_says_where(
    units: tuple[Unit, ...], pool: tuple[Unit, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    made = corrupt(units, pool)

    assert (made.units != units) is bool(units)
    assert any(made.wrong) is bool(units)
    assert len(made.wrong) == len(made.units) + 1
    assert len(made.wrong_tokens) == len(made.tokens) + 1
    rest = iter(units)
    assert all(any(unit == kept for unit in rest) for kept, bad in zip(made.units, made.wrong, strict=False) if not bad)


@given(UNITS, UNITS)
def test_a_transcript_beside_the_true_one_is_wrong_where_it_differs(
    units: tuple[Unit, ...], truth: tuple[Unit, ...]
) -> None:
    made = compared(units, truth)

    assert made.units == units
    assert len(made.wrong) == len(units) + 1
    assert any(made.wrong) is (units != truth)
    rest = iter(truth)
    assert all(any(unit == kept for unit in rest) for kept, bad in zip(units, made.wrong, strict=False) if not bad)


@given(UNITS)
def test_an_untouched_transcript_has_no_errors(units: tuple[Unit, ...]) -> None:
    made = untouched(units)
    assert made.units == units
    assert not any(made.wrong_tokens)


@pytest.mark.parametrize("text", ["", "我想喝水", "開燈𨋢é", "a 我é b", "𨋢𨋢"])
def test_units_are_whole_characters(base: Frontend, text: str) -> None:
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    units = units_of(ids, continuing_ids(base.tokenizer))

    assert [token for unit in units for token in unit] == ids
    assert "".join(base.tokenizer.decode(unit) for unit in units) == base.tokenizer.decode(ids)
    assert [base.tokenizer.decode(unit) for unit in units] == list(text)
