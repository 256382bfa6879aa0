"""How far AdamW can move a value: real optimizers never exceed it, and the worst gradients reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.tasks.envelope import adamw_reach, largest_ratios

BETAS = [(0.9, 0.999), (0.9, 0.99), (0.5, 0.9), (0.95, 0.95), (0.99, 0.9), (0.0, 0.9), (0.9, 0.5)]
EACH_BETAS = pytest.mark.parametrize("betas", BETAS, ids=str)

rates = st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=30)
decays = st.sampled_from([0.0, 0.01, 0.9])


def moved(
    gradients: Sequence[float],
    rates: Sequence[float],
    betas: tuple[float, float],
    decay: float,
    start: float,
    dtype: torch.dtype = torch.float64,
) -> float:
    """How far torch's AdamW takes one parameter."""
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=dtype))
    before = parameter.item()
    optimizer = torch.optim.AdamW([parameter], betas=betas, weight_decay=decay, fused=True)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor([gradient], dtype=dtype)
        optimizer.step()
    return abs(parameter.item() - before)


def worst(steps: int, betas: tuple[float, float]) -> list[float]:
    """The gradients for which the Cauchy–Schwarz inequality is an equality in every step; nearly, where β₁ is 0."""
    growth = betas[1] / max(betas[0], 1e-3)
    return [growth**step for step in range(steps)]


@EACH_BETAS
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1.0), (torch.float32, 1.01)], ids=str)
@given(
    steps=st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-6, 0.5)), min_size=1, max_size=30),
    size=st.sampled_from([1e-9, 1.0, 1e6]),
    like_the_worst=st.booleans(),
    decay=decays,
    start=st.floats(-2, 2),
)
def test_no_gradients_move_a_value_further(
    betas: tuple[float, float],
    dtype: torch.dtype,
    slack: float,
    steps: list[tuple[float, float]],
    size: float,
    like_the_worst: bool,
    decay: float,
    start: float,
) -> None:
    shape = worst(len(steps), betas) if like_the_worst else [1.0] * len(steps)
    gradients = [size * factor * part / max(shape) for (factor, _), part in zip(steps, shape, strict=True)]
    rates = [rate for _, rate in steps]

    assert moved(gradients, rates, betas, decay, start, dtype) <= slack * adamw_reach(rates, *betas, decay, abs(start))


@EACH_BETAS
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_worst_gradients_reach_it(betas: tuple[float, float], decay: float, steps: int) -> None:
    rates = [1e-2 * (1 + math.cos(step)) for step in range(steps)]
    bound = adamw_reach(rates, *betas, decay, 0.3)

    assert 0.99 * bound <= moved(worst(steps, betas), rates, betas, decay, 0.3) <= bound


def test_what_float32_adds_by_rounding_is_allowed_for() -> None:
    rates = [0.6 * 2.0**-23] * 100  # each step up from 1 is rounded to 2⁻²³

    distance = moved([-1.0] * 100, rates, (0.9, 0.999), 0.0, 1.0, torch.float32)

    assert distance > 1.5 * sum(rates)
    assert distance <= adamw_reach(rates, 0.9, 0.999, 0.0, 1.0)


@EACH_BETAS
def test_the_first_step_is_one_learning_rate_and_later_ones_are_longer(betas: tuple[float, float]) -> None:
    ratios = list(islice(largest_ratios(*betas), 40))

    assert ratios[0] == pytest.approx(1.0)
    assert all(later >= before * (1 - 1e-12) for before, later in pairwise(ratios))


def test_at_the_usual_decays_a_step_is_at_most_seven_learning_rates() -> None:
    *_, last = islice(largest_ratios(0.9, 0.999), 20_000)

    assert last == pytest.approx(0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999)), rel=1e-6)
    assert last == pytest.approx(7.27, abs=0.01)


def test_gradients_that_grow_exceed_the_largest_step_that_adams_authors_name() -> None:
    gradients = [0.0] * 3000 + worst(150, (0.9, 0.999))
    rates = [0.0] * (len(gradients) - 1) + [1e-3]  # only the last step moves the value

    assert moved(gradients, rates, (0.9, 0.999), 0.0, 0.0) > 2 * 1e-3 * 0.1 / math.sqrt(0.001)


def test_without_a_second_moment_only_the_first_step_is_bounded() -> None:
    assert adamw_reach([0.1], 0.9, 0.0, 0.0, 0.0) == pytest.approx(0.1)
    assert adamw_reach([0.1, 0.1], 0.9, 0.0, 0.0, 0.0) == math.inf
    assert adamw_reach([0.1, 0.1], 0.0, 0.0, 0.0, 0.0) == pytest.approx(0.2)


def test_a_bound_beyond_any_float_is_infinite() -> None:
    assert adamw_reach([0.0] * 5000, 0.99, 0.1, 0.0, 0.0) == math.inf


@given(rates=rates, decay=decays, largest=st.floats(0, 10))
def test_more_steps_and_larger_values_reach_further(rates: list[float], decay: float, largest: float) -> None:
    bound = adamw_reach(rates, 0.9, 0.999, 0.0, largest)

    assert adamw_reach(rates[:-1], 0.9, 0.999, 0.0, largest) < bound
    assert adamw_reach(rates, 0.9, 0.999, decay, largest) < adamw_reach(rates, 0.9, 0.999, decay, largest + 1)


def test_where_nothing_is_learned_nothing_but_rounding_moves() -> None:
    assert adamw_reach([], 0.9, 0.999, 0.1, 1.0) == 0.0
    assert 0 < adamw_reach([0.0] * 10, 0.9, 0.999, 0.1, 1.0) < 1e-5
