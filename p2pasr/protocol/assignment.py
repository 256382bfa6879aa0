"""Which shards a peer trains on: anyone can recompute it, nobody hands it out."""

from __future__ import annotations

from collections.abc import Mapping

from p2pasr.protocol.cohorts import EVERYBODY, Cohort
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tiers import EVERY, trains


def assign(
    manifest: RunManifest,
    state: bytes,
    covered: Mapping[str, int],
    peer: str,
    cohort: Cohort = EVERYBODY,
    tier: int = EVERY,
) -> tuple[bytes, ...]:
    """A peer's shards for one round.

    Shards still to cover in this epoch come first, then those that are covered already; among equals
    those that the peer's cohort prefers, each group in the order of BLAKE3(state ‖ peer ‖ shard). The
    state's digest is not known before the round before it ended and the peer's ID is its key, so there
    is nothing to choose but the tier, and that only leaves out shards with longer clips.

    Args:
        state: digest of the state that the round starts from.
        covered: hex digest of a shard → merged claims that named it in this epoch, from that state.
        cohort: the peer's.
        tier: the peer's, see :mod:`p2pasr.protocol.tiers`.

    Returns:
        Digests of the first `shards_per_peer` shards, fewer only if the run has fewer for this tier.
    """
    wanted = manifest.data.redundancy

    def rank(shard: bytes) -> tuple[bool, bool, bytes]:
        elsewhere = not cohort.prefers(shard)
        return covered.get(shard.hex(), 0) >= wanted, elsewhere, digest("assign", state + peer.encode() + shard)

    fitting = (bytes.fromhex(shard.digest) for shard in manifest.shards if trains(tier, shard.longest))
    ordered = sorted(fitting, key=rank)
    return tuple(ordered[: manifest.rounds.shards_per_peer])


def segment_seed(state: bytes, peer: str, segment: int) -> bytes:
    """The seed of every random number of one segment: 32 bytes."""
    return digest("segment", state + peer.encode() + segment.to_bytes(4, "big"))
