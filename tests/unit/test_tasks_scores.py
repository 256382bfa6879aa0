"""Scores of decisions, against brute force and against what they must obey."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.tasks.scores import (
    area_under_roc,
    calibration_error,
    confusion,
    detection_errors,
    equal_error_rate,
    misses_at,
)

SCORES = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=30).map(np.array)
"""Few values, so that ties are common."""


@given(SCORES, SCORES)
def test_the_area_is_how_often_a_positive_scores_above_a_negative(positives: np.ndarray, negatives: np.ndarray) -> None:
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert area_under_roc(positives, negatives) == pytest.approx(np.mean(wins))


@given(SCORES, SCORES)
def test_along_the_trade_off_misses_rise_and_false_alarms_fall(positives: np.ndarray, negatives: np.ndarray) -> None:
    misses, false_alarms = detection_errors(positives, negatives)
    assert (misses[0], false_alarms[0], misses[-1], false_alarms[-1]) == (0, 1, 1, 0)
    assert (np.diff(misses) >= 0).all()
    assert (np.diff(false_alarms) <= 0).all()


@given(SCORES, SCORES)
def test_a_point_of_the_trade_off_is_what_one_threshold_does(positives: np.ndarray, negatives: np.ndarray) -> None:
    misses, false_alarms = detection_errors(positives, negatives)
    for threshold, miss, alarm in zip(np.unique([*positives, *negatives]), misses, false_alarms, strict=False):
        assert miss == pytest.approx(np.mean(positives < threshold))
        assert alarm == pytest.approx(np.mean(negatives >= threshold))


@given(SCORES, SCORES)
def test_an_equal_error_rate_lies_between_the_errors_of_two_neighbouring_thresholds(
    positives: np.ndarray, negatives: np.ndarray
) -> None:
    rate = equal_error_rate(positives, negatives)
    misses, false_alarms = detection_errors(positives, negatives)
    assert 0 <= rate <= 1
    assert max(misses[misses <= false_alarms]) <= rate + 1e-12
    assert rate <= min(misses[misses >= false_alarms]) + 1e-12


@given(SCORES, SCORES)
def test_swapping_the_kinds_swaps_the_errors(positives: np.ndarray, negatives: np.ndarray) -> None:
    assert equal_error_rate(-negatives, -positives) == pytest.approx(equal_error_rate(positives, negatives))
    assert area_under_roc(negatives, positives) == pytest.approx(1 - area_under_roc(positives, negatives))


@given(SCORES, SCORES)
def test_kinds_that_do_not_overlap_are_told_apart_without_error(positives: np.ndarray, negatives: np.ndarray) -> None:
    above = positives + 20
    assert equal_error_rate(above, negatives) == 0
    assert misses_at(above, negatives, 0.0) == 0
    assert area_under_roc(above, negatives) == 1


@given(SCORES, SCORES, st.floats(0, 1), st.floats(0, 1))
def test_fewer_false_alarms_cost_more_misses(
    positives: np.ndarray, negatives: np.ndarray, one: float, two: float
) -> None:
    fewer, more = sorted([one, two])
    assert misses_at(positives, negatives, fewer) >= misses_at(positives, negatives, more)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
def test_a_calibration_error_is_the_mean_gap_of_the_bins(pairs: list[tuple[float, bool]], bins: int) -> None:
    members: dict[int, list[tuple[float, bool]]] = {}
    for probability, outcome in pairs:
        members.setdefault(min(int(probability * bins), bins - 1), []).append((probability, outcome))
    gaps = [abs(sum(p for p, _ in inside) - sum(o for _, o in inside)) for inside in members.values()]
    probabilities, outcomes = np.array([p for p, _ in pairs]), np.array([o for _, o in pairs])
    assert calibration_error(probabilities, outcomes, bins) == pytest.approx(sum(gaps) / len(pairs))


@given(st.lists(st.booleans(), min_size=1, max_size=40).map(np.array))
def test_certainty_that_comes_true_is_calibrated_and_that_which_does_not_is_not(outcomes: np.ndarray) -> None:
    assert calibration_error(outcomes.astype(float), outcomes) == 0
    assert calibration_error(1 - outcomes.astype(float), outcomes) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_a_confusion_counts_every_pair_in_its_row_and_column(pairs: list[tuple[int, int]]) -> None:
    counts = confusion([truth for truth, _ in pairs], [guess for _, guess in pairs], 5)
    assert counts.shape == (5, 5)
    assert all(counts[row, column] == pairs.count((row, column)) for row in range(5) for column in range(5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: detection_errors(np.zeros(0), np.ones(1)),
        lambda: detection_errors(np.ones(1), np.array([np.nan])),
        lambda: area_under_roc(np.ones(1), np.zeros(0)),
        lambda: calibration_error(np.zeros(0), np.zeros(0, dtype=bool)),
        lambda: confusion([0], [], 2),
        lambda: confusion([2], [0], 2),
    ],
)
def test_what_cannot_be_scored_is_refused(call: object) -> None:
    with pytest.raises(ValueError):
        call()  # type: ignore[operator]
