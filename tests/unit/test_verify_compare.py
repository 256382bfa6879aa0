"""Is a re-run the same? Bits, groups, and everything that makes no sense."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.tensors import Tensors
from p2pasr.verify.compare import compare, relative_errors

SECTION = VerifySection(close=1e-4, far=1e-2)

START: Tensors = {"param/a": np.zeros((4, 5), np.float32), "param/b": np.ones(7, np.float32)}


def end(seed: int = 0) -> Tensors:
    """Where a segment ends: parameters that moved, and a moment that the start does not have."""
    draw = np.random.default_rng(seed)
    moved = {name: array + draw.normal(size=array.shape).astype(np.float32) for name, array in START.items()}
    return {**moved, "moment exp_avg/a": draw.normal(size=(4, 5)).astype(np.float32)}


def shifted(tensors: Tensors, group: str, error: float) -> Tensors:
    """The same with one group moved away by a multiple of how far it came."""
    out = dict(tensors)
    for name, array in tensors.items():
        if name.split("/")[0] == group:
            out[name] = (array + error * (array - START.get(name, np.zeros_like(array)))).astype(np.float64)
    return out


def doubled(tensors: Tensors) -> Tensors:
    return {name: array.astype(np.float64) for name, array in tensors.items()}


def test_equal_bits_are_the_same() -> None:
    assert compare(START, end(), end(), SECTION) == compare(START, START, START, SECTION)
    assert (compare(START, end(), end(), SECTION).finding, compare(START, end(), end(), SECTION).error) == ("same", 0.0)


@pytest.mark.parametrize("group", ["param", "moment exp_avg"])
@pytest.mark.parametrize(
    ("error", "finding"),
    [(1e-9, "close"), (0.99e-4, "close"), (1.01e-4, "unclear"), (0.99e-2, "unclear"), (1.01e-2, "different")],
)
def test_an_error_in_any_group_counts_as_much_as_that_group_moved(group: str, error: float, finding: str) -> None:
    claimed = doubled(end())
    found = compare(START, claimed, shifted(claimed, group, error), SECTION)
    assert found.finding == finding
    assert found.error == pytest.approx(error, rel=1e-3)


@given(st.floats(1e-6, 1e-1), st.floats(1e-6, 1e-1))
def test_the_error_is_that_of_the_worst_group(one: float, other: float) -> None:
    claimed = doubled(end())
    rerun = shifted(shifted(claimed, "param", one), "moment exp_avg", other)
    errors = relative_errors(START, claimed, rerun)
    assert errors == pytest.approx({"param": one, "moment exp_avg": other}, rel=1e-3)
    assert compare(START, claimed, rerun, SECTION).error == max(errors.values())


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_the_error_does_not_depend_on_the_scale(scale: float, seed: int) -> None:
    start, claimed = doubled(START), doubled(end(seed))
    rerun = shifted(claimed, "param", 1e-3)
    scaled = [{name: array * scale for name, array in tensors.items()} for tensors in (start, claimed, rerun)]
    assert relative_errors(*scaled) == pytest.approx(relative_errors(start, claimed, rerun))


def test_another_learning_rate_is_seen_although_the_direction_is_the_same() -> None:
    claimed = doubled(end())
    assert compare(START, claimed, shifted(claimed, "param", 0.05), SECTION).finding == "different"


def test_a_segment_that_claims_to_have_gone_nowhere_is_another() -> None:
    assert compare(START, {**end(), **START}, end(), SECTION).finding == "different"


def weights(seed: int, step: float, off: float = 0.0) -> Tensors:
    """Weights after a step of this length each, which another machine computes with a relative error of `off`."""
    draw = np.random.default_rng(seed)
    value, sign = draw.normal(0.0, 0.05, 20_000).astype(np.float32), draw.choice([-1.0, 1.0], 20_000)
    error = 1.0 + off * np.random.default_rng(seed + 1).normal(size=20_000)
    return {"param/a": (value + (step * sign * error).astype(np.float32)).astype(np.float32)}


@given(st.integers(0, 1 << 20), st.floats(-14, -3))
def test_what_another_machine_rounds_otherwise_is_never_blamed_however_short_the_steps_are(
    seed: int, exponent: float
) -> None:
    step = 10.0**exponent
    found = compare(weights(seed, 0.0), weights(seed, step), weights(seed, step, 3e-4), VerifySection())
    assert found.finding != "different"


@given(st.integers(0, 1 << 20), st.floats(-8, -3))
def test_who_moved_nothing_or_the_other_way_is_blamed_where_there_was_a_way(seed: int, exponent: float) -> None:
    start, trained = weights(seed, 0.0), weights(seed, 10.0**exponent)
    for claimed in (start, weights(seed, -(10.0**exponent))):
        assert compare(start, claimed, trained, VerifySection()).finding == "different"


@pytest.mark.parametrize(
    "change",
    [
        {"param/a": np.zeros((5, 4), np.float32)},
        {"param/a": np.zeros((4, 5), np.float16)},
        {"param/c": np.zeros(1, np.float32)},
        {"param/a": np.full((4, 5), nan, np.float32)},
        {"param/b": np.full(7, inf, np.float32)},
    ],
    ids=["shape", "type", "one more", "NaN", "infinity"],
)
def test_what_no_training_can_end_with_is_different(change: dict[str, Any]) -> None:
    found = compare(START, {**end(), **change}, end(), SECTION)
    assert (found.finding, found.error) == ("different", inf)


def test_an_array_that_is_missing_is_different() -> None:
    claimed = end()
    del claimed["moment exp_avg/a"]
    assert compare(START, claimed, end(), SECTION).finding == "different"


def test_magnitudes_that_float32_cannot_square_are_compared_all_the_same() -> None:
    huge: Tensors = {"param/a": np.full(3, 3e38, np.float32)}
    other: Tensors = {"param/a": np.full(3, -3e38, np.float32)}
    assert compare({}, huge, other, SECTION).error == pytest.approx(2.0)
