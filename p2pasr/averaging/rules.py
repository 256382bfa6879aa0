"""How several deltas become one.

Everything here is element-wise numpy, one rounding an operation, in an order that does not depend on
who sent first: equal inputs give equal bits on every machine, so a reduction can be repeated and
compared. A rule sees one part of the delta at a time and nothing that a sender says about itself.

=============  ======================================================  =================================
rule           what it does to a part                                  tolerates, of n members
=============  ======================================================  =================================
mean           weighted mean, parts longer than `clip_norm` times the  f bend it by at most
               median norm scaled down to that                         clip_norm · f / n median norms
trimmed-mean   coordinate-wise mean without the `trim` share of the    f ≤ trim · n
               values at each end
median         coordinate-wise middle value                            f < n / 2
krum           the one that is closest to its nearest neighbours       f < (n − 2) / 2
centered-clip  from the last round's aggregate towards the means of    f < n / (2 · `bucket`)
               buckets of members, none pulling further than `radius`
               times the median distance
=============  ======================================================  =================================

`clip_norm` is applied before every rule. What `centered-clip` starts from is part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from p2pasr.averaging.codec import Vector
from p2pasr.protocol.admission import counting, limited, newcomers
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.manifest import RuleSection, RunManifest
from p2pasr.protocol.messages import Claim, message_digest
from p2pasr.protocol.state import condemn, shard_seconds, trained_seconds

NEWCOMER_TRUST: Final = 0.25
"""Share of its weight that a peer has before any of its work was merged."""


def weights(
    claims: Sequence[Claim], manifest: RunManifest, credit: Mapping[str, float], guests: Mapping[str, str]
) -> tuple[float, ...]:
    """The weight of each claim, from what anyone can compute about it.

    Seconds of audio in the assigned shards, scaled by the share of segments trained and by how far the
    peer is trusted, at most `weight_cap` times the median. No number that a sender chose enters.

    With `duplicates: first`, a shard named by several claims counts only for the one with the lowest
    digest; a claim left with none keeps the weight 0. So do claims that do not count, and one whose author is banned
    with this round: more than half of those that count speak against it. Those of newcomers together weigh at most
    `newcomer_share` of all; see :mod:`p2pasr.protocol.admission`.

    Args:
        credit: peer → seconds of audio of its merged claims, from the state that the claims start from.
        guests: guest of whom a claim was merged → who invited it, from there too.
    """
    seconds = shard_seconds(manifest)
    if manifest.data.duplicates == "first":
        owners: dict[bytes, Claim] = {}
        for claim in sorted(claims, key=message_digest, reverse=True):
            owners.update(dict.fromkeys(claim.shards, claim))
        raw = [
            trained_seconds(
                claim, manifest, {s.hex(): seconds[s.hex()] if owners[s] is claim else 0.0 for s in claim.shards}
            )
            for claim in claims
        ]
    else:
        raw = [trained_seconds(claim, manifest, seconds) for claim in claims]
    counted = counting(claims, manifest, credit, guests)
    raw = [weight if claim.peer in counted else 0.0 for weight, claim in zip(raw, claims, strict=True)]
    trusted = [weight * trust(credit.get(claim.peer, 0.0), manifest) for weight, claim in zip(raw, claims, strict=True)]
    judging = [weight for weight, claim in zip(trusted, claims, strict=True) if claim.peer in counted]
    cap = manifest.averaging.weight_cap * median(judging or trusted)
    capped = [min(weight, cap) for weight in trusted] if cap > 0 else trusted
    out = banned(claims, manifest, credit, guests)
    left = [0.0 if claim.peer in out else weight for weight, claim in zip(capped, claims, strict=True)]
    return limited(left, newcomers(claims, manifest, credit), manifest.admission.newcomer_share)


def banned(
    claims: Sequence[Claim], manifest: RunManifest, credit: Mapping[str, float], guests: Mapping[str, str]
) -> set[str]:
    """Whom a round bans: its claims weigh nothing, and its parts are reduced by others.

    Args:
        claims, credit, guests: as for :func:`weights`.
    """
    counted = counting(claims, manifest, credit, guests)
    return set(condemn({}, [claim for claim in claims if claim.peer in counted], 0))


def trust(credit: float, manifest: RunManifest) -> float:
    """Share of its weight that a peer has earned: a quarter at first, all of it after `probation_rounds`.

    It grows linearly with the audio that was merged, so a fresh identity costs rounds of work.

    Args:
        credit: seconds of audio of the peer's merged claims.
    """
    probation = manifest.averaging.probation_rounds * manifest.seconds_per_assignment
    if credit >= probation:
        return 1.0
    return NEWCOMER_TRUST + (1 - NEWCOMER_TRUST) * (credit / probation)


@dataclass(frozen=True, slots=True)
class Center:
    """Where `centered-clip` starts, who shares a bucket, and whose parts say how long a part may be.

    Attributes:
        reference: the same part of the last round's aggregate; None, for zeros, before the first.
        order: all positions of the group, as :func:`drawn_order` gives them.
        newcomers: positions whose parts are scaled down by the length of the others'.
    """

    reference: Vector | None
    order: Sequence[int]
    newcomers: frozenset[int] = frozenset()


def drawn_order(state: bytes, peers: Sequence[str]) -> tuple[int, ...]:
    """Positions of a group's peers in the order of BLAKE3(state ‖ peer): a draw that no leader can bend.

    Args:
        state: digest of the state that the round starts from.
        peers: in the group's order.
    """
    return tuple(sorted(range(len(peers)), key=lambda position: digest("bucket", state + peers[position].encode())))


def aggregate(parts: Mapping[int, Vector], weights: Sequence[float], rule: RuleSection, center: Center) -> Vector:
    """One part of the aggregate, by the manifest's rule.

    Args:
        parts: position in the group → decoded part, all of one length; at least one.
        weights: weight of every position, see :func:`weights`; only `mean` uses more of them than that some are 0
            and left out, for elsewhere a large weight is what a hostile member would want.
        center: what `centered-clip` starts from, and who is new.
    """
    weighty = {position: part for position, part in parts.items() if weights[position] > 0}
    clipped = clip(weighty or parts, rule.clip_norm, center.newcomers)
    if rule.kind == "mean":
        return weighted_mean(clipped, weights)
    if rule.kind == "centered-clip":
        drawn = [clipped[position] for position in center.order if position in clipped]
        return centered_clip(drawn, center.reference, rule)
    stack = [clipped[position] for position in sorted(clipped)]
    if rule.kind == "krum":
        return krum(stack, rule.hostile)
    return trimmed_mean(stack, rule.trim if rule.kind == "trimmed-mean" else 0.5)


def clip(
    parts: Mapping[int, Vector], multiple: float | None, newcomers: frozenset[int] = frozenset()
) -> dict[int, Vector]:
    """Scale down parts that are longer than a multiple of the median length.

    Args:
        newcomers: positions that have no say in that median, where there are others.
    """
    if multiple is None or len(parts) == 1:
        return dict(parts)
    lengths = {position: norm(part) for position, part in parts.items()}
    judging = [length for position, length in lengths.items() if position not in newcomers]
    limit = multiple * median(judging or lengths.values())
    return {position: _shortened(part, lengths[position], limit) for position, part in parts.items()}


def weighted_mean(parts: Mapping[int, Vector], weights: Sequence[float]) -> Vector:
    """The mean of one part over its senders.

    Accumulated in ascending order of the senders' positions; each factor is the sender's share of
    the included weights, rounded to float32 once.

    Args:
        parts: position in the group → decoded part, all of one length; at least one.
        weights: weight of every position. If those included sum to 0, each counts alike.
    """
    order = sorted(parts)
    total = sum(weights[position] for position in order)
    mean = np.zeros_like(parts[order[0]])
    for position in order:
        share = weights[position] / total if total > 0 else 1 / len(order)
        mean = mean + np.multiply(parts[position], np.float32(share))
    return mean


def trimmed_mean(parts: Sequence[Vector], trim: float) -> Vector:
    """Coordinate-wise mean without the ⌊trim · n⌋ smallest and largest values (Yin et al. 2018).

    With `trim` = 0.5 it is the coordinate-wise median.
    """
    count = len(parts)
    cut = min(int(trim * count), (count - 1) // 2)
    kept = np.sort(np.stack(parts), axis=0)[cut : count - cut]
    return _mean(list(kept))


def krum(parts: Sequence[Vector], hostile: float) -> Vector:
    """The part with the smallest sum of squared distances to its nearest others (Blanchard et al. 2017).

    Args:
        hostile: share f / n of members that may be hostile; n − f − 2 neighbours count.
    """
    count = len(parts)
    near = max(1, count - int(hostile * count) - 2)
    squares = [[norm(one - other) ** 2 for other in parts] for one in parts]
    scores = [sum(sorted(row[:i] + row[i + 1 :])[:near]) for i, row in enumerate(squares)]
    return parts[scores.index(min(scores))]


def centered_clip(parts: Sequence[Vector], reference: Vector | None, rule: RuleSection) -> Vector:
    """From a reference towards the parts, each of which pulls only so far (Karimireddy et al. 2021).

    Every `bucket` parts are averaged first, which makes honest ones more alike where members' data
    differ (Karimireddy et al. 2022). Then v ← v + mean(clip(x − v, τ)), `iterations` times over the
    buckets x, where τ is `radius` times their median distance from the reference.

    Args:
        parts: in the order in which they fill the buckets; at least one.
        reference: where v starts; None for zeros.
    """
    buckets = [_mean(parts[first : first + rule.bucket]) for first in range(0, len(parts), rule.bucket)]
    center = np.zeros_like(parts[0]) if reference is None else reference
    limit = rule.radius * median(norm(bucket - center) for bucket in buckets)
    for _ in range(rule.iterations):
        pulls = [bucket - center for bucket in buckets]
        center = center + _mean([_shortened(pull, norm(pull), limit) for pull in pulls])
    return center


def norm(vector: Vector) -> float:
    """L2 norm, the same bits everywhere: squares in float64, summed by halving."""
    values: npt.NDArray[np.float64] = np.square(vector, dtype=np.float64)
    while (count := len(values)) > 1:
        half = (count + 1) // 2
        values[: count - half] += values[half:]
        values = values[:half]
    return sqrt(float(values[0])) if len(values) else 0.0


def _mean(parts: Sequence[Vector]) -> Vector:
    return weighted_mean(dict(enumerate(parts)), (1.0,) * len(parts))


def _shortened(part: Vector, length: float, limit: float) -> Vector:
    return np.multiply(part, np.float32(limit / length)) if length > limit else part
