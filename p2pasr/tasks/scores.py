"""Scores of models that decide rather than write: how well they tell two kinds, or several classes, apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


def detection_errors(positives: Values, negatives: Values) -> tuple[Values, Values]:
    """The detection error trade-off (Martin et al. 1997): both rates at every threshold.

    Args:
        positives, negatives: scores of what is to be accepted and of what is not, shape (n,), at least one each.

    Returns:
        misses, false alarms: share of positives below and of negatives at or above a threshold, for thresholds
        ascending from one that accepts everything to one that accepts nothing. Misses rise, false alarms fall.

    Raises:
        ValueError: there are no positives or no negatives, or one of them is not a number.
    """
    if not len(positives) or not len(negatives):
        raise ValueError("errors of detection need scores of both kinds")
    if not (np.isfinite(positives).all() and np.isfinite(negatives).all()):
        raise ValueError("a score is not a finite number")
    thresholds = np.append(np.unique(np.concatenate([positives, negatives])), np.inf)
    misses = np.searchsorted(np.sort(positives), thresholds) / len(positives)
    false_alarms = 1 - np.searchsorted(np.sort(negatives), thresholds) / len(negatives)
    return misses, false_alarms


def equal_error_rate(positives: Values, negatives: Values) -> float:
    """Where misses and false alarms are equally frequent, on straight lines between the points of the trade-off.

    Raises:
        ValueError: as :func:`detection_errors`.
    """
    misses, false_alarms = detection_errors(positives, negatives)
    after = int(np.argmax(misses >= false_alarms))  # the last point is (1, 0), the first (0, 1)
    gap_before = false_alarms[after - 1] - misses[after - 1]
    gap_after = misses[after] - false_alarms[after]
    share = gap_before / (gap_before + gap_after)
    return float(misses[after - 1] + share * (misses[after] - misses[after - 1]))


def misses_at(positives: Values, negatives: Values, false_alarm_rate: float) -> float:
    """The lowest share of misses at no more than this share of false alarms.

    Raises:
        ValueError: as :func:`detection_errors`.
    """
    misses, false_alarms = detection_errors(positives, negatives)
    return float(misses[false_alarms <= false_alarm_rate].min())


def area_under_roc(positives: Values, negatives: Values) -> float:
    """How often a positive scores above a negative, ties counted half (Mann and Whitney 1947).

    Raises:
        ValueError: there are no positives or no negatives.
    """
    if not len(positives) or not len(negatives):
        raise ValueError("an area under the curve needs scores of both kinds")
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    not_above = np.searchsorted(ordered, positives, side="right")
    return float((below + not_above).sum() / (2 * len(positives) * len(negatives)))


def calibration_error(probabilities: Values, outcomes: npt.NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error (Naeini et al. 2015): how far stated probabilities are from what came true.

    Args:
        probabilities: shape (n,), in [0, 1].
        outcomes: shape (n,), what came true.
        bins: equally wide ranges of probability within which both are averaged.

    Raises:
        ValueError: there are no probabilities.
    """
    if not len(probabilities):
        raise ValueError("a calibration error needs at least one probability")
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=probabilities - outcomes, minlength=bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def confusion(truth: Sequence[int], guesses: Sequence[int], classes: int) -> npt.NDArray[np.int64]:
    """How often each class (rows) was taken for each (columns), shape (classes, classes).

    Raises:
        ValueError: the lengths differ, or a class is out of range.
    """
    if len(truth) != len(guesses):
        raise ValueError(f"{len(truth)} classes but {len(guesses)} guesses")
    pairs: npt.NDArray[Any] = np.array([truth, guesses], dtype=np.int64)
    if pairs.size and not 0 <= pairs.min() <= pairs.max() < classes:
        raise ValueError(f"a class is none of {classes}")
    return np.bincount(classes * pairs[0] + pairs[1], minlength=classes**2).reshape(classes, classes)
