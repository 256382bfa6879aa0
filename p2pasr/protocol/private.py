"""Shards that stay where they were recorded: which of them a peer trains on, and what it says of them.

Nobody else can see them, so nothing that a claim says of them is believed: it is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import DIGEST_BYTES, digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.signing import short
from p2pasr.protocol.tiers import EVERY

NO_TRACE: Final = bytes(DIGEST_BYTES)
"""The trace's root in a claim that commits to no checkpoints."""

LEAST_SECONDS: Final = 1.0
"""No private claim counts for less audio, so that no weight vanishes."""


def draw(shards: Iterable[bytes], state: bytes, peer: str, count: int) -> tuple[bytes, ...]:
    """Which of its own shards a peer trains on in one round: the first in the order of BLAKE3(state ‖ peer ‖ shard).

    Args:
        shards: digests of all that it has.
        state: digest of the state that the round starts from.
        count: how many at most.
    """
    return tuple(sorted(shards, key=lambda shard: digest("assign", state + peer.encode() + shard))[:count])


def conceal(shards: Iterable[bytes], state: bytes, secret: bytes) -> tuple[bytes, ...]:
    """What a claim calls private shards: BLAKE3(secret ‖ state ‖ shard).

    A shard's own digest would let anybody who guesses its bytes see that the guess is right, and see in which rounds
    and runs it was trained on. Whoever is told the secret can check what a claim was about.

    Args:
        shards: their digests.
        state: digest of the state that the round starts from.
        secret: 32 random bytes that its peer keeps to itself.
    """
    return tuple(digest("private-shard", secret + state + shard) for shard in shards)


def counted_seconds(seconds: Sequence[float], manifest: RunManifest) -> float:
    """What a claim says of the audio in private shards of these lengths: no more than counts."""
    return min(max(sum(seconds), LEAST_SECONDS), manifest.data.private_weight_seconds)


def check_private(claim: Claim, manifest: RunManifest) -> None:
    """May a claim say this of private shards?

    Raises:
        Reject: no.
    """
    who = f"the claim of {short(claim.peer)}"
    if len(claim.shards) > manifest.rounds.shards_per_peer or len(set(claim.shards)) < len(claim.shards):
        raise Reject(f"{who} names a private shard twice, or more than {manifest.rounds.shards_per_peer}")
    if not LEAST_SECONDS <= claim.seconds <= manifest.data.private_weight_seconds:
        raise Reject(
            f"{who} states {claim.seconds:g} s of private audio; a claim counts for {LEAST_SECONDS:g} to "
            f"{manifest.data.private_weight_seconds:g}"
        )
    if claim.tier != EVERY:
        raise Reject(f"{who} states tier {claim.tier}, and nobody sees how long private clips are")
    if claim.trace_root != NO_TRACE:
        raise Reject(f"{who} commits to checkpoints, which tell of private shards")
