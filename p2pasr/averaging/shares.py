"""Which member reduces how much: shares that follow measured bandwidth, computed alike by everybody.

A member that reduces a share s of the delta D sends (1 − s) D of its own parts to others and its
results, s D, to each of the n − 1 others. All finish together when (1 + s (n − 2)) D / b is the same
for every member of bandwidth b. The bandwidths are what the *others* measured, and a share is
capped, so that nobody gains by a lie. hivemind solves the same balance by linear programming, whose
last digits may differ between machines; here members must agree to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median_low
from typing import Final

MAX_SHARE: Final = 2.0
"""No member reduces more than this multiple of an equal share."""

RATE_SPREAD: Final = 8
"""Measured rates count within this factor of their median, either way."""

_BISECTIONS: Final = 64


def agreed_rates(reports: Sequence[Mapping[str, int]], peers: Sequence[str]) -> tuple[float, ...]:
    """The sending rate of every member, as the others measured it.

    Args:
        reports: what each member measured: peer → bytes per second, above 0.
        peers: the members, in the same order.

    Returns:
        For each member the median of the others' reports; who was not measured counts as the median
        of those who were. Only ratios matter.
    """
    measured: dict[str, int] = {}
    for peer in peers:
        seen = [report[peer] for other, report in zip(peers, reports, strict=True) if other != peer and peer in report]
        if seen:
            measured[peer] = median_low(seen)
    if not measured:
        return (1.0,) * len(peers)
    middle = float(median_low(measured.values()))
    return tuple(min(max(measured.get(peer, middle), middle / RATE_SPREAD), middle * RATE_SPREAD) for peer in peers)


def split(parts: int, rates: Sequence[float]) -> tuple[range, ...]:
    """Cut the parts of a delta into one run for each member.

    Args:
        rates: bandwidth of each member, in its group's order; 0 for those that do not reduce.

    Returns:
        The parts that each member reduces; together all of them, once.

    Raises:
        ValueError: nobody reduces.
    """
    fractions = _fractions(rates)
    bounds, total = [0], 0.0
    for fraction in fractions:
        total += fraction
        bounds.append(min(parts, int(parts * total + 1e-6)))
    last = max(position for position, rate in enumerate(rates) if rate > 0)
    bounds[last + 1 :] = [parts] * (len(bounds) - last - 1)
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def _fractions(rates: Sequence[float]) -> list[float]:
    """The share of each member, by bisection for the time at which all of them have sent what they must."""
    reducers = sum(rate > 0 for rate in rates)
    if reducers == 0:
        raise ValueError("a group needs a member that reduces")
    others, most = len(rates) - 2, MAX_SHARE / reducers
    if others <= 0 or reducers == 1:
        return [1 / reducers if rate > 0 else 0.0 for rate in rates]

    def until(time: float) -> list[float]:
        return [min(max((time * rate - 1) / others, 0.0), most) if rate > 0 else 0.0 for rate in rates]

    low, high = 0.0, (1 + others) / min(rate for rate in rates if rate > 0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(until(middle)) >= 1 else (middle, high)
    shares = until(high)
    total = sum(shares)
    return [share / total for share in shares]
