"""How several deltas become one. Element-wise numpy, one rounding an operation: equal bits everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from p2pasr.averaging.codec import Vector
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import Claim, message_digest
from p2pasr.protocol.state import shard_seconds, trained_seconds


def weights(claims: Sequence[Claim], manifest: RunManifest) -> tuple[float, ...]:
    """The weight of each claim, from what anyone can compute about it.

    Seconds of audio in the assigned shards, scaled by the share of segments trained, at most
    `weight_cap` times the median. No number that a sender chose enters.

    With `duplicates: first`, a shard named by several claims counts only for the one with the lowest
    digest; a claim left with none keeps the weight 0.
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
    cap = manifest.averaging.weight_cap * median(raw)
    return tuple(min(weight, cap) for weight in raw) if cap > 0 else tuple(raw)


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
