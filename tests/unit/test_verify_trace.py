"""Traces: the checkpoints of a round under one root, kept as long as they may be asked for."""

from __future__ import annotations

import pytest

from p2pasr.averaging.merkle import Tree
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal, Pending
from p2pasr.protocol.encoding import blob_digest
from p2pasr.verify.trace import Trace, retain_traces

from .builders import digest_of, make_identity

RUN, PEER = digest_of("run"), make_identity(1).peer


def test_the_root_commits_to_the_checkpoints_in_order(store: BlobStore) -> None:
    trace = Trace(store, RUN, 7, PEER)
    checkpoints = [b"first", b"second", b"third"]
    for checkpoint in checkpoints:
        trace.add(checkpoint)
    assert trace.checkpoints == list(map(blob_digest, checkpoints))
    tree = Tree("trace", RUN, 7, PEER)
    for index, digest in enumerate(trace.checkpoints):
        tree.check(trace.root, index, 3, digest, tree.prove(trace.checkpoints, index))
        assert store.get(digest) == checkpoints[index]


def test_traces_of_another_round_peer_or_run_have_other_roots(store: BlobStore) -> None:
    roots = set()
    for run, round_number, peer in (
        (RUN, 7, PEER),
        (RUN, 8, PEER),
        (RUN, 7, make_identity(2).peer),
        (digest_of("other"), 7, PEER),
    ):
        trace = Trace(store, run, round_number, peer)
        trace.add(b"checkpoint")
        roots.add(trace.root)
    assert len(roots) == 4


def test_a_trace_without_a_checkpoint_has_no_root(store: BlobStore) -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        _ = Trace(store, RUN, 0, PEER).root


def finish(journal: Journal, store: BlobStore, number: int, rounds: int) -> tuple[bytes, list[bytes]]:
    """A round with two checkpoints of its own, and one that it shares with the round before."""
    delta = store.put("delta", f"delta {number}".encode())
    names = (f"{number} a", f"{number} b", f"shared {number // 2}")
    checkpoints = [store.put("checkpoint", name.encode()) for name in names]
    average = store.put("average", f"average {number}".encode())
    retain_traces(journal, store, number, b"claim", delta, checkpoints, average, rounds)
    return delta, checkpoints


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_traces_are_kept_for_so_many_rounds(journal: Journal, store: BlobStore, rounds: int) -> None:
    finished = {number: finish(journal, store, number, rounds) for number in range(6)}
    kept = [finished[number] for number in range(6 - rounds, 6)]
    assert set(journal.traces()) == set(range(6 - rounds, 6))
    assert set(store.holds("delta")) == {delta for delta, _ in kept}
    assert len(store.holds("average")) == rounds
    assert set(store.holds("checkpoint")) == {digest for _, checkpoints in kept for digest in checkpoints}


def test_a_round_that_is_finished_again_replaces_its_trace(journal: Journal, store: BlobStore) -> None:
    retain_traces(journal, store, 3, b"claim", store.put("delta", b"first"), [store.put("checkpoint", b"1")], b"", 2)
    second = store.put("delta", b"second")
    retain_traces(journal, store, 3, b"other", second, [], b"", 2)
    assert journal.traces() == {3: {"claim": b"other".hex(), "delta": second.hex(), "checkpoints": [], "average": ""}}
    assert store.holds("delta") == [second]
    assert store.holds("checkpoint") == []


def test_what_a_claim_on_another_line_commits_to_stays_as_long(journal: Journal, store: BlobStore) -> None:
    delta, checkpoint = store.put("delta", b"before the fork"), store.put("checkpoint", b"likewise")
    journal.pend(Pending(4, digest_of("the other line"), b"claim", delta, (checkpoint,)))
    finish(journal, store, 4, 2)
    finish(journal, store, 5, 2)
    assert store.get(delta) == b"before the fork"
    assert store.get(checkpoint) == b"likewise"
    finish(journal, store, 6, 2)
    assert delta not in store.holds("delta")
    assert checkpoint not in store.holds("checkpoint")


def test_other_kinds_of_blobs_are_left_alone(journal: Journal, store: BlobStore) -> None:
    state = store.put("state", b"state")
    finish(journal, store, 0, 1)
    finish(journal, store, 5, 1)
    assert store.get(state) == b"state"
