"""The trace of a round's training: the segment-end checkpoints, committed under one Merkle root."""

from __future__ import annotations

from collections.abc import Sequence

from p2pasr.averaging.merkle import Tree
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.private import NO_TRACE


class Trace:
    """Collects the checkpoints of one peer's round.

    Args:
        store: keeps the checkpoints, so that auditors can ask for them; None where nobody may see them, for they tell
            of private shards, so that they are neither kept nor committed to.
        run, round, peer: whose trace it is.
    """

    def __init__(self, store: BlobStore | None, run: bytes, round_number: int, peer: str) -> None:
        self._store = store
        self._tree = Tree("trace", run, round_number, peer)
        self.checkpoints: list[bytes] = []

    def add(self, *checkpoint: bytes | memoryview) -> None:
        """Store the packed checkpoint at the end of a segment, given whole or in pieces."""
        if self._store is not None:
            self.checkpoints.append(self._store.put("checkpoint", *checkpoint))

    @property
    def root(self) -> bytes:
        """What the claim commits to: 32 bytes, zeros for nothing."""
        return NO_TRACE if self._store is None else self._tree.root(self.checkpoints)


def retain_traces(
    journal: Journal,
    store: BlobStore,
    round_number: int,
    claim: bytes,
    delta: bytes,
    checkpoints: Sequence[bytes],
    average: bytes,
    rounds: int,
) -> None:
    """Remember a finished round's trace and delete those whose audit window has closed.

    What other claims of these rounds commit to stays too: after a fork their states may be those that hold.

    Args:
        claim: packed, so that its trace can still be opened after a restart.
        average: digest of what the round's deltas became.
        rounds: how many rounds a trace is kept.
    """
    traces = {number: trace for number, trace in journal.traces().items() if number > round_number - rounds}
    traces[round_number] = {
        "claim": claim.hex(),
        "delta": delta.hex(),
        "checkpoints": [digest.hex() for digest in checkpoints],
        "average": average.hex(),
    }
    journal.keep_traces(traces)
    claims = [each for each in journal.claims() if each.round > round_number - rounds]
    deltas = {bytes.fromhex(trace["delta"]) for trace in traces.values()}
    opened = {bytes.fromhex(digest) for trace in traces.values() for digest in trace["checkpoints"]}
    store.retain("delta", deltas.union(each.delta for each in claims))
    store.retain("average", {bytes.fromhex(trace["average"]) for trace in traces.values()})
    store.retain("checkpoint", opened.union(*(each.checkpoints for each in claims)))
