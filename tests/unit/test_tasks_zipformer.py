"""Zipformer: its parts against what the paper says of them, and that nobody in a batch hears a neighbour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.tasks import build, pin
from p2pasr.tasks.zipformer import (
    LEAST_BYPASS,
    BiasNorm,
    Bypass,
    Downsample,
    ZipformerConfig,
    ZipformerForCTC,
    _aligned,
    _latest_channels,
    distance_features,
    swoosh_l,
    swoosh_r,
)

from .conftest import plan, start_of
from .every_kind import ZIPFORMER


@pytest.fixture(scope="module")
def model() -> ZipformerForCTC:
    """A tiny one all of whose parameters matter, biases too."""
    torch.manual_seed(0)
    made = ZipformerForCTC(ZipformerConfig(5, 80, ZIPFORMER["sizes"])).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=max(math.prod(parameter.shape[1:]), 4) ** -0.5)
    return made


def mask(lengths: Sequence[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), behind=st.integers(0, 40), seed=st.integers(0, 2**32)
)
def test_an_example_hears_neither_its_neighbours_nor_its_padding(
    model: ZipformerForCTC, lengths: list[int], behind: int, seed: int
) -> None:
    longest = max(lengths) + behind
    features = torch.randn(len(lengths), longest, 80, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = model(features, attention_mask=mask(lengths, longest)).logits
        for row, length in enumerate(lengths):
            alone = model(features[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)


def test_gradients_hear_no_padding_either(model: ZipformerForCTC) -> None:
    features = torch.randn(2, 60, 80, requires_grad=True)
    logits = model(features, attention_mask=mask([60, 37], 60)).logits
    logits[1, :10].sum().backward()
    assert features.grad is not None
    assert features.grad[1, :37].abs().sum() > 0
    assert not features.grad[1, 37:].any()
    assert not features.grad[0].any()


def test_every_parameter_learns_from_more_than_rounding() -> None:
    """AdamW makes of a gradient that is only rounding a step of full length, and other machines another one."""
    torch.manual_seed(0)
    model = ZipformerForCTC(ZipformerConfig(5, 80, ZIPFORMER["sizes"], dropout=0.0)).double()
    logits = model(torch.randn(2, 61, 80, dtype=torch.float64), attention_mask=mask([61, 40], 61)).logits
    (logits.log_softmax(-1)[..., 0] * torch.randn(logits.shape[:2])).sum().backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or value.grad.abs().max() < 1e-12]
    assert idle == []


def test_nothing_is_remembered_outside_of_the_parameters(model: ZipformerForCTC) -> None:
    assert not list(model.named_buffers())


@given(time=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_scores_by_distance_stand_where_their_frames_do(time: int, seed: int) -> None:
    scores = torch.randn(2, time, 2 * time, generator=torch.Generator().manual_seed(seed))
    found = _aligned(scores)
    wanted = [[scores[:, i, j - i + time - 1] for j in range(time)] for i in range(time)]
    assert torch.equal(found, torch.stack([torch.stack(row, -1) for row in wanted], 1))


@given(st.integers(2, 200))
def test_a_distance_has_the_same_features_however_long_the_clip(time: int) -> None:
    short, long = (distance_features(length, torch.device("cpu")) for length in (time, time + 7))
    assert torch.equal(long[7:-7], short)
    centre = short[time - 1]
    assert (short - centre).norm(dim=1).argmin() == time - 1


@given(length=st.integers(1, 20), behind=st.integers(0, 10), factor=st.integers(2, 8), shares=st.integers(0, 2**32))
def test_a_slower_frame_is_a_mean_of_the_real_frames_in_it(length: int, behind: int, factor: int, shares: int) -> None:
    layer = Downsample(factor)
    with torch.no_grad():
        layer.shares.copy_(torch.randn(factor, generator=torch.Generator().manual_seed(shares)))
    x = torch.full((1, length + behind, 3), 1e3)
    x[:, :length] = torch.tensor([1.0, -2.0, 0.5])
    out = layer(x, mask([length], length + behind))[0, : -(-length // factor)]
    torch.testing.assert_close(out, x[0, :1].expand_as(out), rtol=1e-2, atol=1e-2)


def test_an_output_takes_each_channel_from_the_last_stack_that_has_it() -> None:
    heard = [torch.full((1, 1, width), float(place)) for place, width in enumerate((2, 5, 4, 3))]
    assert _latest_channels(heard).flatten().tolist() == [3, 3, 3, 2, 1]


def test_activations_are_those_of_the_paper() -> None:
    x = torch.tensor([-10.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    right = torch.log(1 + torch.exp(x - 1)) - 0.08 * x - 0.313261687
    left = torch.log(1 + torch.exp(x - 4)) - 0.08 * x - 0.035
    torch.testing.assert_close(swoosh_r(x), right)
    torch.testing.assert_close(swoosh_l(x), left)


def test_a_norm_keeps_some_of_the_length() -> None:
    norm = BiasNorm(4)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0])
    with torch.no_grad():
        torch.testing.assert_close(norm(7 * x), norm(x), rtol=1e-4, atol=0)
        norm.bias.fill_(3.0)
        norm.log_scale.fill_(1.0)
        torch.testing.assert_close(norm(x), x / np.sqrt(10) * np.e, rtol=1e-4, atol=0)
        assert norm(7 * x).norm() > 2 * norm(x).norm()


def test_a_bypass_lets_most_through_at_first_and_never_less_than_a_fifth() -> None:
    bypass, around, through = Bypass(1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    with torch.no_grad():
        assert float(bypass(around, through)) == pytest.approx(0.9)
        bypass.openness.fill_(-1e3)
        assert float(bypass(around, through)) == pytest.approx(LEAST_BYPASS)


def test_activations_that_are_computed_again_change_no_bit(shard_files: Sequence[Path]) -> None:
    ends = []
    for again in (False, True):
        config: dict[str, Any] = {**ZIPFORMER, "dropout": 0.2, "gradient_checkpointing": again}
        task: Any = build("student", pin("student", config, None, shard_files), seed=3, shards=shard_files)
        assert task.model.net.is_gradient_checkpointing == again
        ends.append(task.segment(start_of(task), shard_files, plan(steps=2))[0].pack())
    assert ends[0] == ends[1]
