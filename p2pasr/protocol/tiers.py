"""Which shards a peer's memory is enough for: it grows with the longest clip that is trained on.

A peer says which of a few tiers it has, so that there is little to choose among, and anybody can recompute the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from p2pasr.errors import Reject
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.signing import short

EVERY: Final = 0
"""The tier of a peer that trains every shard."""

TIERS: Final = (5, 10, 15, 20, 30)
"""The other tiers: seconds of the longest clip that a peer trains."""


def trains(tier: int, longest: float | None) -> bool:
    """Whether peers of a tier train shards with such a longest clip, in seconds; None for one that has no clips."""
    return tier == EVERY or longest is None or longest <= tier


def trains_all(tier: int, shards: Iterable[bytes], lengths: Mapping[str, float]) -> bool:
    """Whether peers of a tier train all of these shards.

    Args:
        shards: their digests.
        lengths: hex digest of a shard → seconds of its longest clip, of those that have clips.
    """
    return all(trains(tier, lengths.get(shard.hex())) for shard in shards)


def check_tier(claim: Claim) -> None:
    """Does a claim state a tier that there is?

    Raises:
        Reject: no.
    """
    if claim.tier not in (EVERY, *TIERS):
        known = ", ".join(map(str, (EVERY, *TIERS)))
        raise Reject(f"the claim of {short(claim.peer)} states tier {claim.tier}; there are only {known}")
