"""Is a re-run segment the one that was claimed? Exact where hardware is alike, within measured bounds where not.

The error is ‖re-run − claimed‖ / ‖claimed − start‖ over each group of arrays (parameters, first
moments, …), in float64. A cosine would see nothing of a wrong learning rate. Between `close` and
`far` nobody can tell honest rounding from a small cheat, and nobody is blamed.

Where a group hardly moved, as at the end of a run, when the learning rate is next to nothing, the way is
counted as :data:`LEAST_WAY` of the group's length: float32 rounds such steps to whole units in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.tensors import Tensors, forms

Finding = Literal["same", "close", "unclear", "different"]

LEAST_WAY: Final = 2.0**-20
"""The shortest way that an error is measured by, as a share of a group's norm: eight units in the last place of
float32, which two honest machines round differently in few values."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a re-run came to.

    Attributes:
        finding: `same` bits; `close` enough for other hardware; `unclear`; `different`: proof.
        error: the largest relative error of any group; infinite where names, shapes or values make no sense.
    """

    finding: Finding
    error: float


def compare(start: Tensors, claimed: Tensors, rerun: Tensors, section: VerifySection) -> Comparison:
    """Compare the end of a claimed segment with that of its re-run.

    Args:
        start: what the segment began with; arrays that are missing here count as zeros.
        claimed, rerun: what it ended with: name → array. The part of a name before the first slash is its group.
    """
    if forms(claimed) != forms(rerun) or not all(_is_finite(array) for array in claimed.values()):
        return Comparison("different", inf)
    if all(np.array_equal(claimed[name], rerun[name]) for name in rerun):
        return Comparison("same", 0.0)
    error = max(relative_errors(start, claimed, rerun).values())
    finding: Finding = "close" if error <= section.close else "unclear" if error < section.far else "different"
    return Comparison(finding, error)


def relative_errors(start: Tensors, claimed: Tensors, rerun: Tensors) -> dict[str, float]:
    """Group → relative error, of arrays with equal names and shapes.

    Args:
        start, claimed, rerun: as for :func:`compare`.
    """
    errors: dict[str, float] = {}
    for group in sorted({name.split("/")[0] for name in rerun}):
        names = [name for name in rerun if name.split("/")[0] == group]
        off = sqrt(sum(_square(rerun[name], claimed[name]) for name in names))
        moved = sqrt(sum(_square(claimed[name], start.get(name)) for name in names))
        least = LEAST_WAY * sqrt(sum(_square(rerun[name], None) for name in names))
        way = max(moved, least)
        errors[group] = off / way if way > 0 else (inf if off > 0 else 0.0)
    return errors


def _is_finite(array: npt.NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all())


def _square(one: npt.NDArray[Any], other: npt.NDArray[Any] | None) -> float:
    first = np.asarray(one, dtype=np.float64)
    if other is None or other.shape != one.shape:
        other = np.zeros_like(first)
    return float(np.sum(np.square(first - np.asarray(other, dtype=np.float64))))
